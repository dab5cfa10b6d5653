"""Host memory as a tier on a card: `python -m benchmarks.gpu.tiers [--disk FOLDER] [--time-limit 240] [--quick]`.

    links       the rate of the copies, each direction, beside what the link gave to plain pinned copies
    tokens      greedy tokens of a small model, from CUDA graphs: memory ample, swapped, prefixes fetched
    profile     the runtime's step times with host memory, for the simulated panel and for policies that plan by cost
    turns       conversations whose history the device has no room for, with a host prefix tier and without, at equal
                load: a share of what one replica can do without
    swaps       one work that wants twice the KV memory there is, by each way of preempting

With `--disk FOLDER`, a fast local disk, the conversations are run without a tier, with a host tier that is too small
for them, and with a disk behind that; instead of `turns` and `swaps`, and with tokens that have been on disk (`disk`).

Runs of `turns` and `swaps` are recorded, replayed (no plan may differ), and simulated from their arrivals with the
profile's cost model. Llama-3.1-8B's shape, random weights, bfloat16, forced lengths. Results go to
DIPTYCH_BENCH_OUT (else benchmarks/results) as gpu-tiers.json and gpu-tiers.md (with a disk
gpu-tiers-disk), renewed after every part. `--quick`: a tiny model and a trial of the script, on a CPU too.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.results import out_folder, revision, save
from benchmarks.gpu.swap import LINK_GB_S, rates
from experiments.divergence import diff_decisions
from experiments.metrics import summarize
from experiments.profiling import profile
from experiments.real import Prepared, load, prepare, run_prepared, start_runner
from experiments.records import Run, read_run
from experiments.replaying import replay_run, simulate_record
from experiments.spec import RunSpec, check_spec
from experiments.workloads import Workload
from policies.costing import decode_ns, prefill_ns
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.disk import block_times
from runtime.engine import Engine
from runtime.kv_cache import bytes_per_block
from runtime.model_runner import ModelRunner
from runtime.sampling.params import SamplingParams
from runtime.weights import LoadedModel, load_model
from simulator.costs.fitted import FittedCost

Result = dict[str, Any]
BLOCK_SIZE = 16
HASH_BLOCK = 64
LOAD = 0.7
"""Of what the replica can do without a tier."""
TURNS = {"none": {}, "write_back": {"offload": "write_back"}}
MORE_TURNS = {"write_through": {"offload": "write_through"}}
"""If there is time."""
SIMULATING_S = 30.0
"""Kept back for the replays and the simulated panel."""
SWAPS = {
    "recompute": {"preemption": "last_admitted"},
    "swap": {"preemption": "last_admitted,mode=swap"},
    "cheapest": {"preemption": "cheapest"},
}
DISK = {
    "host and disk": ({"offload": "write_back,fetch=always"}, True),
    "small host": ({"offload": "write_back,fetch=always"}, False),
    "none": ({}, False),
    "host and disk, where cheaper": ({"offload": "write_back"}, True),
}
"""Policies, and whether there is a disk."""
PARTS = ("turns", "swaps", "disk")
OFFLOADS = ("write_back", "write_through", "after_hits")
COMPARED = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "output_throughput", "duration")


@dataclass(frozen=True)
class Sizes:
    """What is run. Of `turns`: conversations, their turns, the first prompt's tokens, those that each turn adds, and
    output tokens; of `swaps`: requests, prompt and output tokens."""

    model: str
    dtype: str
    small_model: str
    conversations: int
    turns: int
    first: int
    more: int
    output: int
    swapped: tuple[int, int, int]
    num_blocks: int
    num_host_blocks: int
    few_host_blocks: int  # with a disk
    num_disk_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    profile_s: float
    link_blocks: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.first + (self.turns - 1) * self.more + self.output, sum(self.swapped[1:])) + 1


FULL = Sizes(
    "llama-3.1-8b", "bfloat16", "smollm2-135m", 24, 5, 4096, 128, 16, (64, 512, 640), 2304, 8192, 1536, 8192, 64, 2048,
    28.0, (8, 64, 512),
)  # fmt: skip
QUICK = Sizes("tiny", "float32", "tiny", 6, 3, 128, 32, 4, (8, 40, 40), 40, 160, 24, 160, 8, 64, 2.5, (8,))


def base_spec(sizes: Sizes, device: str, *, disk: bool = False) -> RunSpec:
    return check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {"source": sizes.model, "load_format": "dummy", "dtype": sizes.dtype, "device": device},
            "limits": {
                "num_blocks": sizes.num_blocks,
                "num_host_blocks": sizes.few_host_blocks if disk else sizes.num_host_blocks,
                "max_num_seqs": sizes.max_num_seqs,
                "max_num_batched_tokens": sizes.max_num_batched_tokens,
                "max_model_len": sizes.longest,
                "lag": 1,
            },
        }
    )


def conversations(sizes: Sizes, rate: float, seed: int = 0) -> Workload:
    """Poisson arrivals at `rate` a second; the conversations take turns, so that all others come in between."""
    count = sizes.conversations * sizes.turns
    gaps = np.random.default_rng(seed).exponential(1e9 / rate, count)
    talk, turn = np.arange(count) % sizes.conversations, np.arange(count) // sizes.conversations
    prompt = sizes.first + turn * sizes.more
    ids = [tuple(int(t) * 10_000 + i for i in range(int(n) // HASH_BLOCK)) for t, n in zip(talk, prompt, strict=True)]
    output = np.full(count, sizes.output)
    return Workload(
        np.cumsum(gaps).astype(np.int64), prompt, output, output, session=talk, turn=turn, hash_ids=ids,
        hash_block=HASH_BLOCK, name="conversations",
    )  # fmt: skip


def at_once(sizes: Sizes) -> Workload:
    """All requests at the beginning."""
    count, prompt, output = sizes.swapped
    outputs = np.full(count, output)
    return Workload(np.zeros(count, np.int64), np.full(count, prompt), outputs, outputs, name="at-once")


def rate_without(sizes: Sizes, cost: FittedCost) -> float:
    """Requests a second that keep a replica busy for LOAD of the time where nothing is cached."""
    prompt, most = sizes.first + (sizes.turns - 1) * sizes.more // 2, sizes.max_num_batched_tokens
    chunks = [(start, min(most, prompt - start)) for start in range(0, prompt, most)]
    service = sum(prefill_ns(cost, tokens, start) for start, tokens in chunks)
    service += (sizes.output - 1) * decode_ns(cost, 4, 4 * prompt) // 4  # a few decode together
    return LOAD * 1e9 / service


class Bench:
    """One model, one runner; runs are recorded in a scratch folder. `disk`: where blocks are to lie, if they are."""

    def __init__(self, sizes: Sizes, device: str, deadline: float, result: Result, disk: str = "") -> None:
        self.sizes, self.result, self.device = sizes, result, device
        self._deadline = deadline
        self._scratch = Path(tempfile.mkdtemp(prefix="tiers-"))
        self._disk = disk
        self.base = base_spec(sizes, device, disk=bool(disk))
        self.loaded: LoadedModel | None = None

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def close(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run_all(self, keep: Callable[[], None]) -> None:
        """Each part as long as there is time for it."""
        self.result["tokens"] = same_tokens(self.sizes, self.device, self._disk)
        keep()
        with closing(load(self.base.model)) as loaded:
            self.result["gb_s"] = {f"{n} blocks": rates(loaded, n) for n in self.sizes.link_blocks}
            keep()
            prepared = self._with_disk(prepare(self.base, loaded), loaded)
            runner = start_runner(loaded, prepared.limits, prepared.spec.model)
            try:
                self._on(loaded, prepared, runner, keep)
            finally:
                runner.close()

    def _with_disk(self, prepared: Prepared, loaded: LoadedModel) -> Prepared:
        """The same with a disk tier, if there is to be one."""
        if not self._disk:
            return prepared
        dtype = loaded.model.dtype
        read_ns, write_ns = block_times(self._disk, bytes_per_block(loaded.config, BLOCK_SIZE, dtype))
        self.result["disk_block_us"] = {"read": read_ns / 1e3, "write": write_ns / 1e3}
        limits = replace(
            prepared.limits, num_disk_blocks=self.sizes.num_disk_blocks, disk_folder=self._disk, disk_read_ns=read_ns,
            disk_write_ns=write_ns,
        )  # fmt: skip
        return replace(prepared, limits=limits)

    def _on(self, loaded: LoadedModel, prepared: Prepared, runner: ModelRunner, keep: Callable[[], None]) -> None:
        sizes, begin = self.sizes, time.monotonic()
        cost = profile(self.base, sizes.profile_s, loaded=loaded, prepared=prepared, runner=runner)
        swap = cost.calibration.swap
        self.result["profile"] = {
            "seconds": time.monotonic() - begin,
            "steps": cost.calibration.provenance["num_steps"],
            "swap": None if swap is None else swap.model_dump(),
        }
        keep()
        rate = rate_without(sizes, cost)
        self.result["rate"] = rate
        count, prompt, output = sizes.swapped
        tight = min(sizes.num_blocks, count * -(-(prompt + output) // BLOCK_SIZE) // 2)
        talks, seconds = conversations(sizes, rate), sizes.conversations * sizes.turns / rate
        works: list[tuple[str, dict[str, dict[str, str]], Workload, dict[str, Any], float]] = [
            ("turns", TURNS, talks, {}, seconds),
            ("swaps", SWAPS, at_once(sizes), {"num_blocks": tight, "prefix_caching": False}, 12.0),
            ("turns", MORE_TURNS, talks, {}, seconds),
        ]
        if self._disk:
            works = [
                ("disk", {way: policies}, talks, {} if there else {"num_disk_blocks": 0}, seconds)
                for way, (policies, there) in DISK.items()
            ]
        runs: list[tuple[str, str, Run]] = []
        for part, ways, work, limits, expected in works:
            self.result.setdefault(part, {})
            for way, policies in ways.items():
                if self.left() < expected + SIMULATING_S:
                    self.result.setdefault("left_out", []).append(f"{part} {way}")
                    continue
                run = self._record(f"{part}-{way}", policies, work, limits, loaded, prepared, runner, cost)
                runs.append((part, way, run))
                self.result[part][way] = {"real": figures(run)}
                print(f"{self.left():6.1f} s left; {part} {way}: {self.result[part][way]['real']}", flush=True)
                keep()
        for part, way, run in runs:
            self.result[part][way] |= self._simulated(run, cost)
            print(f"{self.left():6.1f} s left; {part} {way}: simulated", flush=True)
            keep()

    def _record(
        self,
        name: str,
        policies: dict[str, str],
        work: Workload,
        limits: dict[str, Any],
        loaded: LoadedModel,
        prepared: Prepared,
        runner: ModelRunner,
        cost: FittedCost,
    ) -> Run:
        content = prepared.spec.model_dump(mode="json")
        spec = check_spec({**content, "policies": {**content["policies"], **policies}})
        folder = self._scratch / name
        given = Prepared(spec, replace(prepared.limits, **limits), cost, {})
        run_prepared(given, loaded, folder, work, runner=runner, timeout_s=60)
        return read_run(folder)

    def _simulated(self, run: Run, cost: FittedCost) -> Result:
        """The replay's differences, and the other panel's figures."""
        replayed, simulated = (run.folder.with_name(f"{run.folder.name}-{kind}") for kind in ("replay", "sim"))
        replay_run(run, replayed, check=False)
        difference = diff_decisions(run, read_run(replayed))
        simulate_record(run, cost, simulated)
        found, real = figures(read_run(simulated)), figures(run)
        errors = {name: found[name] / real[name] - 1 for name in COMPARED if real[name]}
        return {"divergence": None if difference is None else str(difference), "simulated": found, "error": errors}


def figures(run: Run) -> Result:
    """Of one run, in either panel."""
    whole = summarize(run)
    names = (
        "fetched_token_share", "cached_token_share", "preemptions", "offloaded_blocks", "fetched_blocks",
        "swapped_blocks_out", "swapped_blocks_in", "disk_blocks_out", "disk_blocks_in", "disk_blocks_lost",
        "disk_token_share", "copy_out_ms", "copy_in_ms", "copy_wait_ms",
    )  # fmt: skip
    found = {name: whole[name] for name in (*COMPARED, *names)}
    took = found["copy_out_ms"] + found["copy_in_ms"]
    found["copy_hidden_share"] = 1 - found["copy_wait_ms"] / took if took else None
    later = run.requests["cached_tokens"] > 0
    found["requests"], found["requests_with_a_hit"] = len(run.requests), int(later.sum())
    return found


def same_tokens(sizes: Sizes, device: str, disk: str = "") -> Result:
    """Three turns of five conversations, with memory ample and short, by graphs where there is a card."""
    cuda = device == "cuda"
    captured = {"capture_sizes": (1, 2, 4, 8), "mixed_capture_sizes": (64,)} if cuda else {}
    ample = Limits(400, BLOCK_SIZE, 8, 64, 256, lag=1, **captured)  # type: ignore[arg-type]
    short = replace(ample, num_blocks=24, num_host_blocks=200)
    ways = {
        "ample": (ample, StackSpec()),
        "recomputed": (short, StackSpec()),
        "swapped": (short, StackSpec(preemption="last_admitted,mode=swap")),
        **{name: (short, StackSpec(preemption="last_admitted,mode=swap", offload=name)) for name in OFFLOADS},
    }
    if disk:
        shorter = replace(short, num_blocks=12, num_host_blocks=6, num_disk_blocks=200, disk_folder=disk)
        ways = {
            "ample": ways["ample"],
            **{f"disk, {name}": (shorter, StackSpec(offload=name)) for name in OFFLOADS[:2]},
        }
    loaded = load_model(sizes.small_model, load_format="dummy", device=device)
    found, fetched, from_disk = {}, {}, {}
    for name, (limits, stack) in ways.items():
        found[name], counted = _three_turns(loaded, limits, stack)
        fetched[name], from_disk[name] = counted.tokens, counted.from_disk
    return {
        "model": sizes.small_model,
        "graphs": cuda,
        "same": {name: tokens == found["ample"] for name, tokens in found.items()},
        "fetched_tokens": fetched,
        "disk_tokens": from_disk,
    }


def _three_turns(loaded: LoadedModel, limits: Limits, stack: StackSpec) -> tuple[list[list[tuple[int, ...]]], _Fetched]:
    said: list[list[tuple[int, ...]]] = []
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    counted = _Fetched()
    with Engine(loaded, limits, stack.build(block_size=BLOCK_SIZE), recorder=counted, check=True) as engine:
        talks = [[(7 * i + 3 * j) % 500 + 1 for j in range(30 + 11 * i)] for i in range(5)]
        for turn in range(3):
            said.append([one.token_ids for (one,) in engine.generate(talks, params)])
            talks = [[*talk, *answer, 3 + turn, 5, 9] for talk, answer in zip(talks, said[-1], strict=True)]
    return said, counted


class _Fetched:
    """A recorder that counts what requests fetched from host memory, and of that what was read from disk for them."""

    def __init__(self) -> None:
        self.tokens = self.from_disk = 0

    def request(self, row: tuple[Any, ...]) -> None:
        self.tokens += row[list(REQUESTS).index("fetched_tokens")]
        self.from_disk += row[list(REQUESTS).index("disk_tokens")]

    def step(self, row: tuple[Any, ...]) -> None:
        """Not counted."""

    def decision(self, row: tuple[Any, ...]) -> None:
        """Not counted."""


def verdicts(result: Result) -> dict[str, bool | None]:
    """What was to hold; None: not measured."""
    turns = {way: found["real"] for way, found in result.get("turns", {}).items()}
    speed = {way: found["real"]["output_throughput"] for way, found in result.get("swaps", {}).items()}
    replays = [f.get("divergence") for part in PARTS for f in result.get(part, {}).values() if "error" in f]
    best = max((rate[way] for rate in result["gb_s"].values() for way in rate), default=0.0)
    return {
        "tokens are the same": all(result["tokens"]["same"].values()),
        "copies reach 85% of the link": best >= 0.85 * LINK_GB_S[0],
        "a host prefix tier halves the mean TTFT": None
        if {"none", "write_back"} - set(turns)
        else turns["write_back"]["mean_ttft_ms"] <= turns["none"]["mean_ttft_ms"] / 2,
        "swapping beats recomputing": None
        if {"swap", "recompute"} - set(speed)
        else speed["swap"] > speed["recompute"],
        "cheapest is at most 2% below the better": None
        if {"recompute", "swap", "cheapest"} - set(speed)
        else speed["cheapest"] >= 0.98 * max(speed.values()),
        "no replay differs": None if not replays else all(difference is None for difference in replays),
    }


def table(result: Result) -> str:
    lines = [f"{result['model']} on {result['device']}, torch {result['torch']}, revision {result['revision']}", ""]
    lines += ["| holds | |", "| --- | --- |"]
    lines += [f"| {name} | {'–' if held is None else held} |" for name, held in verdicts(result).items()]
    lines += ["", "| blocks in one copy | out, GB/s | in, GB/s |", "| --- | --- | --- |"]
    lines += [f"| {name} | {rate['out']:.1f} | {rate['in']:.1f} |" for name, rate in result["gb_s"].items()]
    lines += [
        "",
        "| run | panel | mean TTFT, ms | mean TPOT, ms | output tokens/s | fetched (from disk) | copies out + in, ms "
        "| hidden |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in PARTS:
        for way, found in result.get(part, {}).items():
            for panel in ("real", "simulated"):
                if panel in found:
                    lines.append(f"| {part} {way} | {panel} | {_row(found[panel])} |")
    return "\n".join(lines) + "\n"


def _row(found: Result) -> str:
    hidden, share = found["copy_hidden_share"], found["fetched_token_share"] or 0.0
    from_disk = found["disk_token_share"] or 0.0
    return " | ".join(
        (
            f"{found['mean_ttft_ms']:.1f}",
            f"{found['mean_tpot_ms']:.2f}",
            f"{found['output_throughput']:,.0f}",
            f"{share:.0%} ({from_disk:.0%})",
            f"{found['copy_out_ms']:.0f} + {found['copy_in_ms']:.0f}",
            "–" if hidden is None else f"{hidden:.0%}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=235, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a trial of the script, on a CPU too")
    parser.add_argument("--disk", default="", metavar="FOLDER", help="measure a disk tier there instead")
    options = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = QUICK if options.quick else FULL
    result: Result = {
        "benchmark": "gpu_tiers",
        "model": sizes.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "revision": revision(),
        "link_gb_s": LINK_GB_S,
        "gb_s": {},
        "finished": False,
    }
    name = f"gpu-tiers{'-disk' if options.disk else ''}{'-quick' if options.quick else ''}"

    def keep() -> None:
        result["seconds"] = time.monotonic() - began
        result["holds"] = verdicts(result)
        save(result, out_folder() / f"{name}.json")
        (out_folder() / f"{name}.md").write_text(table(result))

    bench = Bench(sizes, device, began + options.time_limit, result, options.disk)
    try:
        bench.run_all(keep)
        result["finished"] = True
    finally:
        bench.close()
        if "tokens" in result:
            keep()
    print(table(result), flush=True)


if __name__ == "__main__":
    main()
