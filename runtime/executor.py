"""A rank's part of the model, its KV cache, and what lasts on its device from step to step. Decides nothing.

Where the model is spread over several devices, every rank has one of these, and all of them run the same steps.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policies.plan import DiskCopy
from policies.replica_state import Limits
from runtime.attention import AttentionShape, get_backend
from runtime.device_state import DeviceState, StepRows
from runtime.disk import DiskStore, Told
from runtime.host_memory import HostMemory, Made
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelError
from runtime.models.linear import check_float8
from runtime.parallel.wire import StepWork
from runtime.sampling.plain import PlainSampler
from runtime.startup import timed
from runtime.weights import LoadedModel

if TYPE_CHECKING:
    from runtime.graphs import CapturedStep, StepGraphs

Sample = Callable[[Tensor], Tensor]
"""Token ids, int64 [R], from float32 logits [R, vocab_size]."""


def _check_device(device: torch.device, kv_dtype: torch.dtype | None) -> None:
    """Raises ModelError for what this device cannot do."""
    if device.type != "cuda":
        return
    if importlib.util.find_spec("triton") is None:
        raise ModelError("a CUDA device needs the package triton; pip install 'diptych[gpu]'")
    if kv_dtype == torch.float8_e4m3fn:
        check_float8(device)


def _identity(loaded: LoadedModel, block_size: int, dtype: torch.dtype) -> bytes:
    """Whose blocks they are, and of what shape."""
    return hashlib.sha256(repr((loaded.name, loaded.config, block_size, dtype)).encode()).digest()


class Executor:
    """On a card steps are queued on `stream`; where the attention allows it they run from captured CUDA graphs, for the
    sizes that `limits` names. On a CPU they run at once.

    Args:
        loaded: the rank's part of the model; it is attached to a new cache of `limits.num_blocks` blocks.
        attention: as `runtime.attention.get_backend` has it: a name, a pair by phase, "auto" or "fastest".
        kv_dtype: of the cache; the model's own where None.
    """

    def __init__(
        self, loaded: LoadedModel, limits: Limits, *, attention: str = "auto", kv_dtype: torch.dtype | None = None
    ) -> None:
        self.startup_seconds: dict[str, float] = {}
        self._model, self._ranks = loaded.model, loaded.ranks
        self.device = loaded.model.device
        self._vocab_size = loaded.config.vocab_size
        _check_device(self.device, kv_dtype)
        with timed(self.startup_seconds, "kv_cache"):
            self.kv_cache = PagedKVCache(
                loaded.config,
                limits.num_blocks,
                limits.block_size,
                dtype=kv_dtype or loaded.model.dtype,
                device=self.device,
            )
        self.copies: Made | None = None  # those of the last step, if it made any
        self._host_memory: HostMemory | None = None
        if limits.num_host_blocks:
            with timed(self.startup_seconds, "host_memory"):
                self._host_memory = HostMemory(self.kv_cache, limits.num_host_blocks)
        self._disk: DiskStore | None = None
        if limits.num_disk_blocks:
            assert self._host_memory is not None
            if loaded.ranks.size > 1:
                raise ModelError("a disk tier is for a model on one device; leave out limits.num_disk_blocks or --disk")
            with timed(self.startup_seconds, "disk"):
                identity = _identity(loaded, limits.block_size, self.kv_cache.dtype)
                self._disk = DiskStore(limits.disk_folder, identity, self._host_memory)
        shape = AttentionShape.of(loaded.config, limits.block_size, self.kv_cache.dtype)
        backend = get_backend(attention, self.device, shape)
        self._model.attach(self.kv_cache, backend)
        slots = limits.max_num_seqs
        cuda = self.device.type == "cuda"
        self._state = DeviceState(slots, limits.max_model_len, limits.block_size, self.device, fused=cuda)
        self._plain_sampler = PlainSampler(loaded.model.layout, self._ranks, self.device, fused=cuda)
        self.stream: torch.cuda.Stream | None = None
        self._graphs: StepGraphs | None = None
        if cuda:
            try:
                self._start_on_card(
                    [size for size in limits.capture_sizes if backend.capturable and size <= slots],
                    limits.mixed_capture_sizes if backend.captures_chunks else (),
                )
            except BaseException:
                self._model.detach(self.kv_cache)  # or it would hold the memory for as long as the model lives
                raise

    def _start_on_card(self, decode_sizes: Collection[int], mixed_sizes: Collection[int]) -> None:
        from runtime.graphs import StepGraphs  # Triton is not needed elsewhere

        self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        if decode_sizes or mixed_sizes:
            with timed(self.startup_seconds, "capture"):
                self._graphs = StepGraphs(
                    self._model, self._state, self._plain_sampler, decode_sizes, mixed_sizes, self.stream
                )

    def use_disk(self, copies: Sequence[DiskCopy], told: Told, ready: Callable[[], None]) -> None:
        """Begin these, on threads of their own. `ready`: waits for the steps that do not run on a stream."""
        assert self._disk is not None, "a plan without disk blocks reads none"
        assert self._host_memory is not None
        self._disk.start(copies, self._host_memory.ready() or ready, told)

    def wait_for_disk(self) -> None:
        """For all that has begun; it has been told then."""
        if self._disk is not None:
            self._disk.wait()

    def wait(self) -> None:
        """Wait for the steps that are queued."""
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        """Wait for the steps on their way, and let the graphs and the KV cache go."""
        try:
            self.wait()
        finally:
            if self._disk is not None:
                self._disk.close()
                self._disk = None
            if self._host_memory is not None:
                self._host_memory.close()
                self._host_memory = None
            self._graphs = None
            self._model.detach(self.kv_cache)
            del self.kv_cache

    def execute(self, work: StepWork, sample: Sample | None = None) -> Tensor:
        """Run a step, or queue it; returns the sampled token ids, int64 [R], on the device.

        `sample`: how rows are sampled that are not plain, on rank 0; the other ranks have none.
        """
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            return self._execute(work, sample)

    def _execute(self, work: StepWork, sample: Sample | None) -> Tensor:
        rows, state, num = work.rows, self._state, len(work.rows.sampled_rows)
        self.copies = None
        if work.copies:
            assert self._host_memory is not None, "a plan without host blocks swaps nobody"
            self.copies = self._host_memory.make(work.copies)
        captured = self.captured(rows, work.padded_tokens)
        padded = None if captured is None else (captured.num_seqs, captured.num_tokens)
        state.send(rows, work.arrived, work.temperature, work.keys, padded=padded)
        if captured is not None:
            captured.graph.replay()
            if work.plain:
                return captured.tokens[:num]
            hidden = captured.hidden[:num]
        else:
            state.apply_blocks()
            hidden = self._model.forward(state.inputs_of(rows))
            if not num:
                return torch.empty(0, dtype=torch.int64, device=self.device)
            hidden = hidden[state.part("sampled", num).long()]
        logits = self._model.logits(hidden)
        tokens = torch.empty(num, dtype=torch.int64, device=self.device)
        if work.plain:
            self._plain_sampler(logits, state, tokens)
        else:
            whole = self._gather(logits)
            if sample is not None:
                tokens = sample(whole.float())
            self._ranks.broadcast(tokens)
        state.store(tokens)
        return tokens

    def _gather(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary from the ranks' parts of it: every rank gets them, rank 0 needs them."""
        if self._ranks.size == 1:
            return logits
        parts = self._ranks.all_gather(logits)  # [size, R, rows]
        return parts.transpose(0, 1).flatten(1)[:, : self._vocab_size]

    def captured(self, rows: StepRows, padded_tokens: int | None) -> CapturedStep | None:
        """The captured step that runs these rows, if one does."""
        if self._graphs is None or padded_tokens is None:
            return None
        return self._graphs.find(len(rows.slots) > rows.num_decodes, padded_tokens)
