"""Runs steps on the device. Keeps each running request's tokens and block table there, so that the last sampled token
never has to come back to the host before the next step, and a step sends only what changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policies.control_plane import ControlPlane
from policies.plan import Mode, Step
from policies.request import Request
from runtime.attention import get_backend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.sampling.batch import SamplingState
from runtime.sampling.sampler import Logprobs, Sampler
from runtime.sequence import Sequence, TokenLogprobs
from runtime.weights import LoadedModel

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request that gets a slot with this step, with all its tokens so far."""

    slot: int
    sequence: Sequence
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step as arrays: row i is `lengths[i]` tokens from position `starts[i]` on of the request in `slots[i]`."""

    arrived: list[Arrived]
    new_blocks: Ints  # [3, N]: slot, column, block id
    slots: Ints
    starts: Ints
    lengths: Ints
    sampled_rows: Ints
    sampled_positions: Ints  # output tokens before the one to sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled token ids, in the order of `requests`, on the host.

    `device_ns`: from when the device could begin (the launch, or the end of the step before) until the result was
    there. The hand-over to the device and back is in it, so that in a simulation with these times nothing is missing.
    `known_at`: when the host knew (`monotonic_ns`): at once where it was waiting, else when it came to ask.
    """

    requests: list[Request]
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    device_ns: int
    known_at: int

    def logprobs_of(self, row: int, wanted: int | None) -> tuple[TokenLogprobs, ...]:
        """Of one row, with its `wanted` most probable tokens (-1: all): the table is as wide as the widest row's."""
        if wanted is None:
            return ()
        found = self.logprobs[row]
        if wanted in (-1, len(found.top)):
            return (found,)
        return (TokenLogprobs(found.sampled, found.top[:wanted]),)


def _by_row(found: Logprobs | None) -> dict[int, TokenLogprobs]:
    """The device's table as the host wants it."""
    if found is None:
        return {}
    sampled, ids, values = found.sampled.tolist(), found.top_ids.tolist(), found.top.tolist()
    return {
        row: TokenLogprobs(sampled[i], tuple(zip(ids[i], values[i], strict=True)))
        for i, row in enumerate(found.row_numbers)
    }


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. The result has the time (`monotonic_ns`) at which it was there."""

    step: Step
    requests: list[Request]
    launched_at: int
    result: Future[tuple[Tensor, Logprobs | None, int]]


class ModelRunner:
    """The model, its KV cache, and the requests that have a slot.

    Steps run one after another on a thread of their own, so that on the CPU too the engine plans while a step runs.

    Args:
        loaded: the model; it is attached to a new cache of `plane.limits.num_blocks` blocks.
        plane: asked for block tables, and for the members of the decode group by its steps' differences.
        attention: backend name, or "auto".
        kv_dtype: of the cache; the model's own where None.
    """

    def __init__(
        self, loaded: LoadedModel, plane: ControlPlane, *, attention: str = "auto", kv_dtype: torch.dtype | None = None
    ) -> None:
        limits = plane.limits
        self._plane = plane
        self._model = loaded.model
        self._device = loaded.model.device
        self._block_size = limits.block_size
        self.kv_cache = PagedKVCache(
            loaded.config,
            limits.num_blocks,
            limits.block_size,
            dtype=kv_dtype or loaded.model.dtype,
            device=self._device,
        )
        loaded.model.attach(self.kv_cache, get_backend(attention, self._device))
        slots, length = limits.max_num_seqs, limits.max_model_len
        columns = -(-length // limits.block_size) + 1
        self._tokens = torch.zeros(slots, length + 1, dtype=torch.int64, device=self._device)
        self._block_tables = torch.zeros(slots, columns, dtype=torch.int32, device=self._device)
        self._sampler = Sampler(loaded.config.vocab_size, self._device)
        self._sampling = SamplingState(slots, loaded.config.vocab_size, loaded.config.eos_token_ids, self._device)
        # On the host: what the next step starts from.
        self._free_slots = list(range(slots - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._computed = np.zeros(slots, np.int64)
        self._prompt = np.zeros(slots, np.int64)
        self._num_blocks = np.zeros(slots, np.int64)
        self._group: dict[int, Request] = {}
        self._group_rows: tuple[list[Request], Ints] | None = None  # its members and their slots, until it changes
        self._paused: dict[int, int] = {}  # request id -> computed tokens, of a request that gave up its slot
        # What the device does not know yet. It waits here where a step gives a request a slot and runs nothing.
        self._arrived: list[Arrived] = []
        self._grown: list[Request] = []
        self._last_end = 0  # when the last collected step ended
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model-runner")

    def close(self) -> None:
        """Wait for the steps on their way, and let the thread and the KV cache go."""
        self._thread.shutdown(wait=True)
        self._model.detach(self.kv_cache)
        del self.kv_cache

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
            if mode is Mode.KEEP:
                self._paused[request.id] = int(self._computed[self._slot_of[request.id]])
            else:
                self._paused.pop(request.id, None)
            self.release(request)
        starting = [*step.resumed, *step.admitted]
        self._arrived += [self._arrive(sequence_of(request.id)) for request in starting]
        self._grown += [*starting, *step.grown]
        if not step.runs:
            return None
        inputs, requests = self._prepare(step)
        return Launched(step, requests, time.monotonic_ns(), self._thread.submit(self._run, inputs))

    def _leave_group(self, request: Request) -> None:
        if self._group.pop(request.id, None) is not None:
            self._group_rows = None

    def _arrive(self, sequence: Sequence) -> Arrived:
        slot = self._free_slots.pop()
        self._slot_of[sequence.request.id] = slot
        self._prompt[slot] = sequence.request.num_prompt_tokens
        self._num_blocks[slot] = 0
        self._computed[slot] = self._paused.pop(sequence.request.id, 0)
        return Arrived(slot, sequence, list(sequence.token_ids))

    def _prepare(self, step: Step) -> tuple[StepInputs, list[Request]]:
        arrived, self._arrived = self._arrived, []
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
        inputs = StepInputs(arrived, self._new_blocks(grown), slots, starts, lengths, rows, positions)
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
        entries: list[tuple[int, int, int]] = []
        for request in grown:
            slot = self._slot_of.get(request.id)
            if slot is None:
                continue  # it stopped again before it ran
            table = self._plane.block_table(request)
            known = int(self._num_blocks[slot])
            entries += [(slot, column, table[column]) for column in range(known, len(table))]
            self._num_blocks[slot] = len(table)
        return np.array(entries, np.int64).reshape(-1, 3).T

    def _slots(self, requests: list[Request]) -> Ints:
        slot_of = self._slot_of
        return np.fromiter((slot_of[request.id] for request in requests), np.int64, len(requests))

    # The step itself, on the runner's thread, in order

    @torch.inference_mode()
    def _run(self, inputs: StepInputs) -> tuple[Tensor, Logprobs | None, int]:
        for new in inputs.arrived:
            self._take_in(new)
        if inputs.new_blocks.size:
            slot, column, block = self._to_device(inputs.new_blocks)
            self._block_tables[slot, column] = block.int()
        hidden = self._model.forward(self._forward_inputs(inputs))
        token_ids, logprobs = self._sample(hidden, inputs)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # there may be no sample to wait for
        if logprobs is not None:
            logprobs = Logprobs(
                logprobs.row_numbers, logprobs.sampled.cpu(), logprobs.top_ids.cpu(), logprobs.top.cpu()
            )
        return token_ids.cpu(), logprobs, time.monotonic_ns()  # the copy waits for the device

    def _take_in(self, new: Arrived) -> None:
        ids, sequence = new.token_ids, new.sequence
        self._tokens[new.slot, : len(ids)] = torch.tensor(ids).to(self._device)
        prompt = sequence.request.num_prompt_tokens
        self._sampling.add(new.slot, sequence.params, sequence.sampling_key, ids[:prompt], ids[prompt:])

    def _forward_inputs(self, inputs: StepInputs) -> ForwardInputs:
        ends = np.cumsum(inputs.lengths)
        row_of_token = np.repeat(np.arange(len(inputs.slots)), inputs.lengths)
        offsets = np.arange(int(ends[-1])) - (ends - inputs.lengths)[row_of_token]
        host = np.stack([inputs.slots[row_of_token], inputs.starts[row_of_token] + offsets])
        slot, position = self._to_device(host)
        seq_lens = inputs.starts + inputs.lengths
        columns = -(-int(seq_lens.max()) // self._block_size)
        blocks = self._block_tables[slot, position // self._block_size].long()
        return ForwardInputs(
            input_ids=self._tokens[slot, position],
            positions=position,
            slot_mapping=blocks * self._block_size + position % self._block_size,
            query_start_loc=self._to_device(np.concatenate([[0], ends])).int(),
            seq_lens=self._to_device(seq_lens).int(),
            block_table=self._block_tables[self._to_device(inputs.slots), :columns],
            max_query_len=int(inputs.lengths.max()),
            max_seq_len=int(seq_lens.max()),
            host_query_lens=inputs.lengths.tolist(),
            host_seq_lens=seq_lens.tolist(),
        )

    def _sample(self, hidden: Tensor, inputs: StepInputs) -> tuple[Tensor, Logprobs | None]:
        rows = inputs.sampled_rows
        if not len(rows):
            return torch.empty(0, dtype=torch.int64), None
        last = self._to_device((np.cumsum(inputs.lengths) - 1)[rows])
        logits = self._model.logits(hidden[last]).float()
        slots = inputs.slots[rows]
        sampled = self._sampler(logits, self._sampling.batch(slots, inputs.sampled_positions))
        ends = (inputs.starts + inputs.lengths)[rows]
        slot, position = self._to_device(np.stack([slots, ends]))
        self._tokens[slot, position] = sampled.token_ids
        return sampled.token_ids, sampled.logprobs

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    # The result, on the engine's thread

    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step's sampled tokens. Raises what went wrong on the device."""
        waiting = not launched.result.done()
        token_ids, logprobs, ended_at = launched.result.result()
        known_at = time.monotonic_ns()
        if waiting:
            ended_at = known_at  # being woken takes its time too
        # A short step may have ended before the host was awake from waiting for the one before.
        began_at = max(launched.launched_at, self._last_end)
        self._last_end = max(began_at, ended_at)
        device_ns = self._last_end - began_at
        return StepResult(launched.requests, token_ids.tolist(), _by_row(logprobs), device_ns, known_at)
