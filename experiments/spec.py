"""What a run is, as a specification: read from YAML or flags, checked at the edge, stored whole in run.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from experiments.link_spec import LinkSpec
from experiments.pool_spec import NotNegative, PoolSpec
from experiments.workloads.spec import GENERATORS, Count, Positive, Seed, SequenceLength, WorkloadSpec
from policies import model_shape, registry
from policies.registry import PolicySpec
from policies.replica_state import Limits
from policies.stack import StackSpec

CaptureSizes = tuple[Annotated[int, Field(strict=True, ge=1)], ...]

_LIMITS = Limits(num_blocks=1)
_STACK = StackSpec()


class SpecError(ValueError):
    """A specification that cannot be used; the message names file, field and what was expected."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitsSpec(_Part):
    """What one replica holds and runs.

    Attributes:
        num_blocks: KV blocks; None: as many as `kv_cache_gib` holds.
        kv_cache_gib: memory for the KV cache; None: 1 GiB on a CPU, what is free on a GPU, and for a simulated device
            what its memory leaves beside the weights.
        num_host_blocks: KV blocks in host memory, for requests that are preempted with `mode=swap`; None: as many as
            `host_memory_gib` holds.
        host_memory_gib: host memory for them; None: none, and nobody is swapped out.
        num_disk_blocks: KV blocks on disk, for prefixes that host memory has no more room for; None: as many as
            `disk_gib` holds.
        disk_gib: disk for them; None: none.
        disk_folder: where they lie; not needed in a simulation.
        disk_gb_s: what the disk reads and writes, in 10^9 bytes a second; None: tried out, or in a simulation the
            calibration's, or the device's.
        disk_block_us: the same as the time of one block, for a cost model that does not know a block's bytes.
        memory_share: of the device's memory, the share that weights, the largest step and the KV cache may take
            together; None: 0.95 of a GPU, 0.9 of a simulated device.
        max_model_len: longest sequence, prompt and output; None: the model's limit, 8192 at most (simulated: 32768).
        capture_sizes: batch sizes, ascending, at which steps of decodes alone run from captured CUDA graphs; None: the
            default ladder on a GPU whose attention can be captured, none on a CPU; simulated: the calibration's.
        mixed_capture_sizes: the same for steps with prefill chunks, in tokens.
        lag: 1 plans a step while the one before runs; 0 takes turns.
        plan_lead_ms: with lag 1, while a step with chunks runs, the next one is planned when that is expected to end
            within so long, so that what arrives meanwhile can be in it. None: 3 on a GPU; at once on a CPU; simulated:
            the calibration's.
    """

    num_blocks: Annotated[int, Field(strict=True, ge=1, le=2**24)] | None = None
    kv_cache_gib: Positive | None = None
    num_host_blocks: Annotated[int, Field(strict=True, ge=0, le=2**24)] | None = None
    host_memory_gib: Positive | None = None
    num_disk_blocks: Annotated[int, Field(strict=True, ge=0, le=2**28)] | None = None
    disk_gib: Positive | None = None
    disk_folder: str = ""
    disk_gb_s: Positive | None = None
    disk_block_us: Positive | None = None
    memory_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    block_size: Annotated[int, Field(strict=True, ge=1, le=1024)] = _LIMITS.block_size
    max_num_seqs: Annotated[int, Field(strict=True, ge=1, le=65_536)] = _LIMITS.max_num_seqs
    max_num_batched_tokens: Count = _LIMITS.max_num_batched_tokens
    max_model_len: SequenceLength | None = None
    prefix_caching: bool = _LIMITS.prefix_caching
    capture_sizes: CaptureSizes | None = None
    mixed_capture_sizes: CaptureSizes | None = None
    lag: Annotated[int, Field(strict=True, ge=0, le=1)] = 1
    plan_lead_ms: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None

    @property
    def plan_lead_ns(self) -> int | None:
        """`plan_lead_ms` in whole nanoseconds."""
        return None if self.plan_lead_ms is None else round(1e6 * self.plan_lead_ms)

    @model_validator(mode="after")
    def _one_size(self) -> LimitsSpec:
        if self.num_blocks is not None and self.kv_cache_gib is not None:
            raise ValueError("give num_blocks or kv_cache_gib, not both")
        if self.num_host_blocks is not None and self.host_memory_gib is not None:
            raise ValueError("give num_host_blocks or host_memory_gib, not both")
        if self.num_disk_blocks is not None and self.disk_gib is not None:
            raise ValueError("give num_disk_blocks or disk_gib, not both")
        if self.disk_gb_s is not None and self.disk_block_us is not None:
            raise ValueError("give disk_gb_s or disk_block_us, not both")
        return self

    @model_validator(mode="after")
    def _a_ladder(self) -> LimitsSpec:
        for name, bound in (("capture_sizes", "max_num_seqs"), ("mixed_capture_sizes", "max_num_batched_tokens")):
            sizes, most = getattr(self, name) or (), getattr(self, bound)
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name} must ascend, not {list(sizes)}")
            if sizes and sizes[-1] > most:
                raise ValueError(f"{name} ends at {sizes[-1]}, above {bound}={most}; leave that out")
        return self


class ModelSpec(_Part):
    """The model that the real panel runs.

    Attributes:
        source: a folder, a GGUF file, a hub id, the default model's name, or with `dummy` a preset's.
        device: cpu, cuda, cuda:1, ...
        tensor_parallel: over how many devices each layer is split, from `device` on; on a CPU so many processes.
        quantization: `fp8` rounds the layers' weights to float8 (e4m3) once they are loaded, each row with a scale of
            its own; embedding, norms and LM head stay as they are. Not of a mixture of experts.
        kv_cache_dtype: `fp8` keeps keys and values as float8 (e4m3), so that twice as many fit; `auto`: as `dtype`.
    """

    source: Annotated[str, Field(min_length=1)] = "SmolLM2-135M-Instruct"
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    tensor_parallel: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    attention: str = "auto"
    quantization: Literal["none", "fp8"] = "none"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"

    @field_validator("device")
    @classmethod
    def _torchs(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError(f"write cpu, cuda or cuda:1, not {device!r}")
        return device

    @model_validator(mode="after")
    def _quantisable(self) -> ModelSpec:
        if self.quantization == "fp8" and self.dtype == "float32":
            raise ValueError("quantization 'fp8' needs dtype bfloat16 or float16, not float32")
        return self


_FIELDS_OF_COST = {
    "fitted": ("calibration", "residuals"),
    "roofline": ("model", "device", "dtype", "tensor_parallel"),
    "constant": ("step_ms", "swap_ns_per_token"),
}


class CostSpec(_Part):
    """How the simulated panel turns steps into time. (A recorded run's own step times are what `diptych replay` uses.)

    Attributes:
        kind: `fitted` from a calibration file that `diptych profile` wrote; `roofline` from a model's shape and a
            device's data sheet; `constant`, every step the same.
        calibration: the file, for `fitted`.
        residuals: for `fitted`: step times are drawn, with this seed, around what the fit predicts, as far off as it
            was on held-out steps; runs with several seeds give a band. None: as predicted.
        model, device: for `roofline`; a model shape by name (`SmolLM2-135M-Instruct` is `smollm2-135m`); a device by
            name, `cpu` for this one's, or a file of one.
        dtype: of weights and KV cache, for `roofline`.
        tensor_parallel: how many such devices share each layer, for `roofline`; `fitted` has what was measured.
        step_ms: for `constant`.
        swap_ns_per_token: for `constant`: what each token of KV adds that is copied to or from host memory; 0.
    """

    kind: Literal["fitted", "roofline", "constant"] = "roofline"
    calibration: str | None = None
    residuals: Seed | None = None
    model: str = "llama-3.1-8b"
    device: str = "h100-sxm"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    tensor_parallel: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    step_ms: Positive | None = None
    swap_ns_per_token: Annotated[int, Field(strict=True, ge=0, le=10**9)] | None = None

    @field_validator("model")
    @classmethod
    def _shape_of(cls, name: str) -> str:
        shape = name.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
        return shape if shape in model_shape.PRESETS else name

    @model_validator(mode="after")
    def _what_it_needs(self) -> CostSpec:
        for kind, fields in _FIELDS_OF_COST.items():
            given = [field for field in fields if field in self.model_fields_set and getattr(self, field) is not None]
            if kind != self.kind and given:
                raise ValueError(f"{given[0]} is only for cost {kind!r}, not {self.kind!r}")
        if self.kind == "fitted" and self.calibration is None:
            raise ValueError("cost 'fitted' needs calibration, a file that `diptych profile` wrote")
        if self.kind == "constant" and self.step_ms is None:
            raise ValueError("cost 'constant' needs step_ms")
        return self

    @model_serializer(mode="wrap")
    def _what_applies(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in ("kind", *_FIELDS_OF_COST[self.kind])}


class PoliciesSpec(_Part):
    """The policy stack, each role as `name,knob=value,...` or as a mapping with a name."""

    scheduler: str = _STACK.scheduler
    queue: str = _STACK.queue
    admission: str = _STACK.admission
    preemption: str = _STACK.preemption
    eviction: str = _STACK.eviction
    offload: str = _STACK.offload
    router: str = "round_robin"
    autoscaler: str = "fixed"

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(PolicySpec.parse(value)) if isinstance(value, dict) else value

    @field_validator("*")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        registry.find(str(info.field_name), PolicySpec.parse(value).name)
        return value

    @property
    def stack(self) -> StackSpec:
        return StackSpec(self.scheduler, self.queue, self.admission, self.preemption, self.eviction, self.offload)


class RunSpec(_Part):
    """One run, for either panel or both.

    Attributes:
        target: the panel that `diptych run` uses.
        seed: of prompts' content and of sampling; the workload has a seed of its own.
        replicas: of the simulated panel and of `diptych serve`; a real run has one.
        cost: how the simulated panel turns steps into time (a roofline of an 8B model on an H100 where nobody says);
            policies of either panel that plan by predicted cost use it too.
        pools: of the simulated panel, in place of `replicas`: those of a pool are alike.
        link: between the simulated panel's replicas, for routers that move KV cache.
        cold_start_s: of the simulated panel, from an autoscaler's decision until a replica serves; None: what it takes
            to read the weights over the device's host link.
        price_per_hour: what a device costs, in any currency, for estimates of the money that tokens cost.
        forced_lengths: the real panel ends each request after its recorded output tokens, whatever they are.
        decisions: record every decision; off makes long simulations smaller.
    """

    target: Literal["real", "sim", "both"] = "real"
    workload: WorkloadSpec
    policies: PoliciesSpec = PoliciesSpec()
    limits: LimitsSpec = LimitsSpec()
    model: ModelSpec = ModelSpec()
    cost: CostSpec | None = None
    replicas: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1
    pools: tuple[PoolSpec, ...] = ()
    link: LinkSpec = LinkSpec()
    cold_start_s: NotNegative | None = None
    price_per_hour: NotNegative | None = None
    seed: Seed = 0
    forced_lengths: bool = True
    decisions: bool = True

    @model_validator(mode="after")
    def _comparable(self) -> RunSpec:
        if self.target == "both" and self.cost is None:
            raise ValueError("target 'both' needs cost: what the simulation is to take the real panel for")
        return self

    @model_validator(mode="after")
    def _pools_that_work(self) -> RunSpec:
        if not self.pools:
            return self
        if self.replicas != 1:
            raise ValueError("give replicas or pools, not both; a pool has replicas of its own")
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools must have different names, not {', '.join(names)}")
        roles = {pool.role for pool in self.pools}
        if roles != {"both"}:
            if not registry.moves_kv(registry.find("router", PolicySpec.parse(self.policies.router).name)):
                raise ValueError(
                    f"pools for prefill or decode alone need a router that moves KV cache, as disaggregated, "
                    f"not {self.policies.router}"
                )
            for role in ("prefill", "decode"):
                if not roles & {role, "both"}:
                    raise ValueError(f"no pool does {role}; give one the role {role} or both")
        for i in range(len(self.pools)):
            self.of_pool(i)  # whose fields are checked here
        return self

    def check_for_real(self) -> None:
        """Raise SpecError for a cluster that only a simulation can have."""
        for field, given in (("pools", bool(self.pools)), ("autoscaler", self.policies.autoscaler != "fixed")):
            if given:
                raise SpecError(f"{field}: for simulations so far; leave it out, or try it with diptych simulate")

    @property
    def num_replicas(self) -> int:
        """Of the simulated panel, at the start."""
        return sum(pool.replicas for pool in self.pools) or self.replicas

    def of_pool(self, index: int) -> RunSpec:
        """The specification of a run on the replicas of one pool alone. Raises SpecError for what it gives wrong."""
        pool = self.pools[index]
        given = self.model_dump(exclude_unset=True, exclude={"pools"})
        own = pool.model_dump(exclude_unset=True, exclude={"name", "replicas", "role", "device", "cost"})
        cost = {**({} if pool.device is None else {"device": pool.device}), **pool.cost}
        base = given.get("cost") or {}
        if _kind(cost, _kind(base)) != _kind(base):
            given["cost"] = {}
        try:
            return RunSpec.model_validate(
                _merged(given, {**own, "replicas": pool.replicas, **({"cost": cost} if cost else {})})
            )
        except ValidationError as error:
            raise ValueError(f"pool {pool.name}: {first_error(error)}") from None


def read_spec(path: str | Path, overrides: dict[str, Any] | None = None) -> RunSpec:
    """A specification from a YAML file; `overrides` (nested dictionaries) win over it. Raises SpecError."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"; for the workload of that name write -w {path}" if str(path) in GENERATORS else ""
        raise SpecError(f"{path} cannot be read: {error.strerror}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} must hold the fields of a run by name, such as workload and policies")
    if "base" in content and "workload" not in content:
        raise SpecError(f"{path} is of a sweep: diptych sweep {path}")
    over = overrides or {}
    cost, other = content.get("cost"), over.get("cost")
    if isinstance(cost, dict) and isinstance(other, dict) and _kind(other, _kind(cost)) != _kind(cost):
        content["cost"] = {}  # the fields of one kind mean nothing to another
    return check_spec(_merged(content, over), str(path))


def _kind(cost: dict[str, Any], default: Any = CostSpec.model_fields["kind"].default) -> Any:
    return cost.get("kind", default)


def check_spec(content: dict[str, Any], origin: str = "the specification") -> RunSpec:
    """A specification from plain values. Raises SpecError with the first field that is wrong."""
    try:
        return RunSpec.model_validate(content)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")  # what a validator of ours raised
        raise SpecError(f"{origin}: {first_error(error)}") from cause


_GROUPS: dict[str, type[BaseModel]] = {
    "workload": WorkloadSpec,
    "policies": PoliciesSpec,
    "limits": LimitsSpec,
    "model": ModelSpec,
    "cost": CostSpec,
    "link": LinkSpec,
    "pools": PoolSpec,
}


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a run's specification: its field, and what was expected."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        *path, name = (str(part) for part in first["loc"])
        known = list((_GROUPS[path[0]] if path else RunSpec).model_fields)
        return f"{field}: unknown field; {registry.nearest(name, known)}known: {', '.join(known)}"
    whole = first["type"] in ("missing", "value_error") or isinstance(given, dict)
    return (f"{field}: {message}" if field else message) + ("" if whole else f", not {given!r}")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
