"""Runs steps on the device. Each running request's tokens and block table stay there, so that the last sampled token
never has to come back to the host before the next step, and a step sends only what changed.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from policies.control_plane import ControlPlane
from policies.plan import NO_COPIES, BlockCopy, CopyTimes, DiskCopy, Mode, Step
from policies.replica_state import Limits
from policies.request import Request
from runtime.attention import AttentionShape, get_backend
from runtime.device_state import Arrived, Ints, StepRows
from runtime.disk import Told
from runtime.executor import Executor
from runtime.host_memory import Made
from runtime.kv_cache import PagedKVCache
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import thread_clock
from runtime.parallel.wire import StepWork
from runtime.sampling.batch import SamplingState
from runtime.sampling.sampler import Logprobs, Sampler
from runtime.sequence import Sequence, TokenLogprobs
from runtime.weights import LoadedModel

_RECENT = 8
_RESULTS = 4
"""Buffers for sampled tokens on the host: more than there are steps in flight."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step needs of the host. `padded_tokens` is the size of the captured graph that runs it, if one does."""

    copies: list[BlockCopy]  # to host memory and back, before anything else
    arrived: list[tuple[int, Sequence, list[int]]]  # slot, and all tokens so far
    rows: StepRows
    padded_tokens: int | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled token ids, in the order of `requests`, on the host.

    `device_ns`: from when the device could begin (the launch, or the end of the step before) until the result was
    there. A captured step's launch is when its graph is queued, another one's when the host begins to queue it. The way
    to the device and back is in it, so that in a simulation with these times nothing is missing.
    `known_at`: when the host knew (`monotonic_ns`): at once where it was waiting, else when it came to ask.
    """

    requests: list[Request]
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    device_ns: int
    known_at: int
    copies: CopyTimes

    def logprobs_of(self, row: int, wanted: int | None) -> tuple[TokenLogprobs, ...]:
        """Of one row, with its `wanted` most probable tokens (-1: all): the table is as wide as the widest row's."""
        if wanted is None:
            return ()
        found = self.logprobs[row]
        if wanted in (-1, len(found.top)):
            return (found,)
        return (TokenLogprobs(found.sampled, found.top[:wanted]),)


def _by_row(found: Logprobs | None) -> dict[int, TokenLogprobs]:
    """The device's table as the host wants it; waits for the device."""
    if found is None:
        return {}
    sampled, ids, values = found.sampled.tolist(), found.top_ids.tolist(), found.top.tolist()
    return {
        row: TokenLogprobs(sampled[i], tuple(zip(ids[i], values[i], strict=True)))
        for i, row in enumerate(found.row_numbers)
    }


class Pending(Protocol):
    """The result of a step that may still run."""

    def done(self) -> bool:
        """Whether `result` will not wait."""
        ...

    def result(self) -> tuple[list[int], Logprobs | None]:
        """Wait; sampled token ids, and log probabilities where rows asked for them."""
        ...

    def ended_at(self, began_at: int) -> int:
        """After `result`: when the step ended (`monotonic_ns`), if its turn on the device came at `began_at`."""
        ...

    def copy_times(self) -> CopyTimes:
        """After `result`: how long its copies to host memory and back took."""
        ...


@dataclass(frozen=True, slots=True)
class OnThread:
    """A step on the runner's own thread, on a CPU."""

    future: Future[tuple[Tensor, Logprobs | None, int, Made | None]]

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> tuple[list[int], Logprobs | None]:
        token_ids, logprobs, _, _ = self.future.result()
        return token_ids.tolist(), logprobs

    def ended_at(self, began_at: int) -> int:
        return self.future.result()[2]

    def copy_times(self) -> CopyTimes:
        return _times_of(self.future.result()[3])


@dataclass(frozen=True, slots=True)
class OnStream:
    """A step on a CUDA stream; `token_ids` is filled on the host when `ended` has happened."""

    token_ids: Tensor
    logprobs: Logprobs | None
    began: torch.cuda.Event
    ended: torch.cuda.Event
    copies: Made | None

    def done(self) -> bool:
        return self.ended.query()

    def result(self) -> tuple[list[int], Logprobs | None]:
        self.ended.synchronize()
        return self.token_ids.tolist(), self.logprobs

    def ended_at(self, began_at: int) -> int:
        return began_at + round(1e6 * self.began.elapsed_time(self.ended))

    def copy_times(self) -> CopyTimes:
        return _times_of(self.copies)


def _nothing() -> None:
    """Ends once what was asked for before has."""


def _times_of(copies: Made | None) -> CopyTimes:
    return NO_COPIES if copies is None else copies.times()


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    step: Step
    requests: list[Request]
    queued_from: int  # the host begins to hand it over
    launched_at: int  # the device may begin
    pending: Pending


def _start(loaded: LoadedModel, limits: Limits, attention: str, kv_dtype: torch.dtype | None) -> Executor:
    """This rank's executor, and those of the others."""
    ranks = loaded.ranks
    if not isinstance(ranks, Leader):
        return Executor(loaded, limits, attention=attention, kv_dtype=kv_dtype)
    shape = AttentionShape.of(loaded.config, limits.block_size, kv_dtype or loaded.model.dtype)
    attention = get_backend(attention, loaded.model.device, shape).name  # the same on every rank
    started = ranks.order("start", limits, attention, kv_dtype)
    executor = None
    try:
        executor = Executor(loaded, limits, attention=attention, kv_dtype=kv_dtype)
        ranks.wait(started)
        ranks.serving = True
        return executor
    except Exception as error:
        if executor is not None:
            executor.close()
        raise ranks.explain(error) from error


class ModelRunner:
    """The model, its KV cache, and the requests that have a slot.

    On a CPU steps run one after another on a thread of their own, so that there too the engine plans while a step
    runs. On a card they are queued on a stream; where the attention allows it they run from captured CUDA graphs, for
    the sizes that `plane.limits` names.

    Args:
        loaded: the model; it is attached to a new cache of `plane.limits.num_blocks` blocks.
        plane: asked for block tables, and for the members of the decode group by its steps' differences.
        attention: as `runtime.attention.get_backend` has it: a name, a pair by phase, "auto" or "fastest".
        kv_dtype: of the cache; the model's own where None.
    """

    def __init__(
        self, loaded: LoadedModel, plane: ControlPlane, *, attention: str = "auto", kv_dtype: torch.dtype | None = None
    ) -> None:
        limits = plane.limits
        self._plane = plane
        self._ranks = loaded.ranks
        self._num_slots, device = limits.max_num_seqs, loaded.model.device
        self._executor = _start(loaded, limits, attention, kv_dtype)
        self.startup_seconds = self._executor.startup_seconds
        self._sampler = Sampler(loaded.config.vocab_size, device)
        eos = loaded.config.eos_token_ids
        self._sampling = SamplingState(self._num_slots, loaded.config.vocab_size, eos, device)
        self._num_host_blocks, self._num_disk_blocks = limits.num_host_blocks, limits.num_disk_blocks
        self._forget()
        self._last_end = 0  # when the last collected step ended
        self._recent: dict[int, deque[int]] = {}  # how long the last steps with chunks took, by their padded tokens
        self._thread: ThreadPoolExecutor | None = None
        self._computed_s: Callable[[], float] | None = None
        if device.type == "cuda":
            self._results = [torch.zeros(self._num_slots, dtype=torch.int64, pin_memory=True) for _ in range(_RESULTS)]
            self._next_result = 0
        else:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="model-runner")
            self._computed_s = self._thread.submit(thread_clock).result()

    def _forget(self) -> None:
        """Nobody has a slot."""
        slots = self._num_slots
        # On the host: what the next step starts from.
        self._free_slots = list(range(slots - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._computed = np.zeros(slots, np.int64)
        self._prompt = np.zeros(slots, np.int64)
        self._num_blocks = np.zeros(slots, np.int64)
        self._group: dict[int, Request] = {}
        self._group_rows: tuple[list[Request], Ints] | None = None  # its members and their slots, until it changes
        self._paused: dict[int, int] = {}  # request id -> computed tokens, of one that gave up its slot, not its KV
        # What the device does not know yet. It waits here where a step gives a request a slot and runs nothing.
        self._arrived: list[tuple[int, Sequence, list[int]]] = []
        self._grown: list[Request] = []

    def serve(self, plane: ControlPlane) -> None:
        """Run the steps of another control plane from now on: whoever had a slot is forgotten, the KV cache and the
        captured graphs stay.

        Raises ValueError for limits that these were not made for; fewer blocks are no matter.
        """
        ours, theirs = self._plane.limits, plane.limits
        for name in ("block_size", "max_num_seqs", "max_model_len", "capture_sizes", "mixed_capture_sizes"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(f"{name} is {getattr(ours, name)} here, and cannot become {getattr(theirs, name)}")
        there = {"num_blocks": self.kv_cache.num_blocks, "num_host_blocks": self._num_host_blocks}
        there["num_disk_blocks"] = self._num_disk_blocks
        for name, most in there.items():
            if getattr(theirs, name) > most:
                raise ValueError(f"{name} is {most} here, and cannot become {getattr(theirs, name)}")
        self.wait()
        self._plane = plane
        self._forget()

    def wait(self) -> None:
        """Wait for the steps on their way."""
        if self._thread is not None:
            self._thread.submit(_nothing).result()
        self._executor.wait()
        self._executor.wait_for_disk()

    def give_up(self, error: BaseException) -> None:
        """Serve nothing any more after an error here: the other ranks may wait for this one in the midst of a step."""
        if isinstance(self._ranks, Leader):
            self._ranks.fail(f"rank 0: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Wait for the steps on their way, and let the thread, the graphs and the KV cache go, on every rank."""
        try:
            if self._thread is not None:
                self._thread.shutdown(wait=True)
        finally:
            try:
                self._executor.close()
            finally:
                if isinstance(self._ranks, Leader):
                    self._ranks.serving = False
            if isinstance(self._ranks, Leader) and not self._ranks.failed:
                self._ranks.wait(self._ranks.order("stop"))

    @property
    def kv_cache(self) -> PagedKVCache:
        """This rank's."""
        return self._executor.kv_cache

    def check(self) -> None:
        """Raise RankFailed where another rank of the model has failed."""
        self._ranks.check()

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Call this, on another thread, when another rank of the model fails."""
        if isinstance(self._ranks, Leader):
            self._ranks.on_failure = on_failure

    def release(self, request: Request) -> None:
        """The request has ended, or has stopped running: its slot is free for the next step.

        A step in flight may still write to the slot. Steps run in order, so whoever gets it next overwrites that.
        """
        self._leave_group(request)
        if request.state.ended:
            self._paused.pop(request.id, None)
        slot = self._slot_of.pop(request.id, None)
        if slot is not None:
            self._free_slots.append(slot)

    # Launch, on the engine's thread

    def launch(self, step: Step, sequence_of: Callable[[int], Sequence]) -> Launched | None:
        """Note who stopped and who started running, and start the step if there is one, behind those before it."""
        for request in step.left:
            self._leave_group(request)
        for request, mode in step.preempted:
            slot = self._slot_of.get(request.id)
            if mode is Mode.RECOMPUTE:
                self._paused.pop(request.id, None)
            elif slot is not None:  # else it is paused, and its blocks go to the host after all
                self._paused[request.id] = int(self._computed[slot])
            self.release(request)
        starting = [*step.resumed, *step.admitted]
        self._arrived += [self._arrive(sequence_of(request.id)) for request in starting]
        self._grown += [*starting, *step.grown]
        if not step.runs:
            return None
        inputs, requests = self._prepare(step)
        queued_from = launched_at = time.monotonic_ns()
        if self._thread is not None:
            return Launched(step, requests, queued_from, launched_at, OnThread(self._thread.submit(self._run, inputs)))
        try:
            pending = self._queue(inputs)
        except Exception as error:
            raise self._ranks.explain(error) from error
        if self._executor.captured(inputs.rows, inputs.padded_tokens) is not None:
            launched_at = time.monotonic_ns()  # a graph is the last thing that is queued, and nothing runs before it
        return Launched(step, requests, queued_from, launched_at, pending)

    def use_disk(self, copies: SequenceOf[DiskCopy], told: Told) -> None:
        """Begin to read and write these, once the steps launched so far have made their copies. `told` is called on
        other threads."""
        ready = _nothing if self._thread is None else self._thread.submit(_nothing).result
        self._executor.use_disk(copies, told, ready)

    def _leave_group(self, request: Request) -> None:
        if self._group.pop(request.id, None) is not None:
            self._group_rows = None

    def _arrive(self, sequence: Sequence) -> tuple[int, Sequence, list[int]]:
        slot = self._free_slots.pop()
        self._slot_of[sequence.request.id] = slot
        self._prompt[slot] = sequence.request.num_prompt_tokens
        self._num_blocks[slot] = 0
        self._computed[slot] = self._paused.pop(sequence.request.id, 0)
        return slot, sequence, list(sequence.token_ids)

    def _prepare(self, step: Step) -> tuple[StepInputs, list[Request]]:
        arrived = [new for new in self._arrived if self._slot_of.get(new[1].request.id) == new[0]]
        self._arrived = []
        grown, self._grown = self._grown, []
        requests, slots = self._decodes(step)
        first_chunk = len(requests)
        if step.chunks:
            chunked = [chunk.request for chunk in step.chunks]
            requests = requests + chunked
            slots = np.concatenate([slots, self._slots(chunked)])
        starts, lengths = self._computed[slots], np.ones(len(slots), np.int64)
        samples = np.ones(len(slots), np.bool_)
        for row, chunk in enumerate(step.chunks, first_chunk):
            starts[row], lengths[row], samples[row] = chunk.start, chunk.num_tokens, chunk.samples
        ends = starts + lengths
        self._computed[slots] = ends
        rows = np.flatnonzero(samples)
        positions = (ends - self._prompt[slots])[rows]
        part = StepRows(self._new_blocks(grown), slots, starts, lengths, rows, positions, first_chunk)
        inputs = StepInputs(step.copies, arrived, part, step.shape.padded_tokens if step.shape.graph else None)
        return inputs, requests if len(rows) == len(requests) else [requests[row] for row in rows.tolist()]

    def _decodes(self, step: Step) -> tuple[list[Request], Ints]:
        """The requests that decode in this step, and their slots."""
        if not step.decode_all:
            return step.decodes, self._slots(step.decodes)
        if step.joined:
            self._group.update((request.id, request) for request in step.joined)
            self._group_rows = None
        if self._group_rows is None:
            members = list(self._group.values())
            self._group_rows = members, self._slots(members)
        rows = self._group_rows
        for request in step.capped:
            self._leave_group(request)
        return rows

    def _new_blocks(self, grown: Iterable[Request]) -> Ints:
        """What the device's block tables lack: [N, 3] of slot, column, block id."""
        entries: list[tuple[int, int, int]] = []
        for request in grown:
            slot = self._slot_of.get(request.id)
            if slot is None:
                continue  # it stopped again before it ran
            table = self._plane.block_table(request)
            known = int(self._num_blocks[slot])
            entries += zip(itertools.repeat(slot), range(known, len(table)), table[known:], strict=False)
            self._num_blocks[slot] = len(table)
        return np.array(entries, np.int64).reshape(-1, 3)

    def _slots(self, requests: list[Request]) -> Ints:
        slot_of = self._slot_of
        return np.fromiter((slot_of[request.id] for request in requests), np.int64, len(requests))

    # The step itself: on the runner's thread, or queued on the stream by the engine's

    def _run(self, inputs: StepInputs) -> tuple[Tensor, Logprobs | None, int, Made | None]:
        token_ids, logprobs = self._step(inputs)
        return token_ids, logprobs, time.monotonic_ns(), self._executor.copies

    def _queue(self, inputs: StepInputs) -> OnStream:
        with torch.cuda.stream(self._executor.stream):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            token_ids, logprobs = self._step(inputs)
            host = self._results[self._next_result][: len(token_ids)]
            self._next_result = (self._next_result + 1) % _RESULTS
            host.copy_(token_ids, non_blocking=True)
            if logprobs is not None:
                logprobs = logprobs.to_host()
            ended.record()
        return OnStream(host, logprobs, began, ended, self._executor.copies)

    @torch.inference_mode()
    def _step(self, inputs: StepInputs) -> tuple[Tensor, Logprobs | None]:
        """Have every rank run it."""
        for slot, sequence, ids in inputs.arrived:
            prompt = sequence.request.num_prompt_tokens
            self._sampling.add(slot, sequence.params, sequence.sampling_key, ids[:prompt], ids[prompt:])
        rows = inputs.rows
        slots = rows.slots[rows.sampled_rows]
        work = StepWork(
            inputs.copies,
            [Arrived(slot, ids) for slot, _, ids in inputs.arrived],
            rows,
            *self._sampling.temperature_and_keys(slots),
            self._sampling.plain(slots, rows.draws),
            inputs.padded_tokens,
        )
        if isinstance(self._ranks, Leader):
            self._ranks.send(work)
        found: list[Logprobs | None] = [None]

        def sample(logits: Tensor) -> Tensor:
            sampled = self._sampler(logits, self._sampling.batch(slots, rows.draws))
            found[0] = sampled.logprobs
            return sampled.token_ids

        token_ids = self._executor.execute(work, sample)
        return token_ids, found[0]

    # The result, on the engine's thread

    def expected_end(self, launched: Launched) -> int | None:
        """When a step with chunks on its way will have ended, going by the last ones of its size (`monotonic_ns`):
        rather too early than too late. None where there was no such step.
        """
        recent = self._recent.get(launched.step.shape.padded_tokens)
        return None if recent is None else max(launched.launched_at, self._last_end) + min(recent)

    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step's sampled tokens. Raises what went wrong on the device."""
        waiting = not launched.pending.done()
        try:
            with self._ranks.waiting(self._computed_s):
                token_ids, logprobs = launched.pending.result()
        except Exception as error:
            raise self._ranks.explain(error) from error
        self._ranks.check()  # after a rank has failed, what comes back is nothing
        known_at = time.monotonic_ns()
        # A short step may have ended before the host was awake from waiting for the one before.
        began_at = max(launched.launched_at, self._last_end)
        # Being woken takes its time too; but where the host came late, the step ended before.
        queued_at = max(launched.queued_from, self._last_end)
        ended_at = known_at if waiting else min(known_at, launched.pending.ended_at(queued_at))
        self._last_end = max(began_at, ended_at)
        device_ns = self._last_end - began_at
        if launched.step.chunks:
            self._recent.setdefault(launched.step.shape.padded_tokens, deque(maxlen=_RECENT)).append(device_ns)
        times = launched.pending.copy_times()
        return StepResult(launched.requests, token_ids, _by_row(logprobs), device_ns, known_at, times)
