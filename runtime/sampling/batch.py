"""The sampling state of the running requests, and one step's part of it on the device.

`SamplingState` is a table by slot on the host. `SamplingState.batch` picks the rows of a step with NumPy,
decides which features any of them uses, and sends what those need in two copies. The sampler then looks at
what is None and never at a value, so it needs nothing back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policies.random_stream import RandomStream
from runtime.sampling.filters import FilterRows
from runtime.sampling.params import SamplingParams
from runtime.sampling.penalties import PenaltyRows, PenaltyTable
from runtime.sampling.stop import masked_below_min_tokens

IntArray = npt.NDArray[np.int64]


def sampling_key(engine_seed: int, request_id: int | str, params: SamplingParams, index: int = 0) -> int:
    """The 64-bit key of the random draws of one continuation of one request.

    With `params.seed`, the draws depend on that seed and `index` alone, so the same call gives the same
    tokens again; without, on the engine's seed, the request id and `index`.

    Args:
        index: which of the request's `n` continuations.
    """
    if params.seed is not None:
        return RandomStream(params.seed, "sampling.seeded").uint64(0, index)
    return RandomStream(engine_seed, "sampling").uint64(request_id, index)


@dataclass(frozen=True, slots=True)
class MinTokensMask:
    """Stop tokens that rows may not sample yet: M (row, token) pairs with the row's position and minimum.

    `rows`, `tokens`, `minimum`: int64 [M].
    """

    rows: Tensor
    tokens: Tensor
    minimum: Tensor


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The rows that asked for log probabilities, L of them.

    `rows` int64 [L] on the device, or None for every row; `row_numbers` the same on the host; `top` is the
    largest number of most probable tokens that any of them wants.
    """

    rows: Tensor | None
    row_numbers: tuple[int, ...]
    top: int


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What the sampler needs for R rows. A field is None where no row uses the feature.

    `keys`, `positions` int64 [R]; `temperature`, `noise_scale` (1 for a random row, 0 for a greedy one) and
    `log_min_p` float32 [R, 1].
    """

    num_rows: int
    any_random: bool
    keys: Tensor
    positions: Tensor
    temperature: Tensor | None
    noise_scale: Tensor | None
    log_min_p: Tensor | None
    filters: tuple[FilterRows, ...]
    penalties: PenaltyRows | None
    min_tokens: MinTokensMask | None
    logprobs: LogprobRows | None


class _Upload:
    """Small arrays of one type, sent as one copy: `add` gives the device tensor, `send` fills them all."""

    def __init__(self, dtype: torch.dtype, capacity: int, device: torch.device) -> None:
        # Pinned: a copy from pageable memory would wait for the device.
        self._host = torch.empty(capacity, dtype=dtype, pin_memory=device.type == "cuda")
        self._device = torch.empty(capacity, dtype=dtype, device=device)
        self._used = 0

    def add(self, array: npt.NDArray[Any]) -> Tensor:
        start, self._used = self._used, self._used + array.size
        self._host[start : self._used] = torch.from_numpy(array)
        return self._device[start : self._used]

    def column(self, array: npt.NDArray[Any]) -> Tensor:
        return self.add(array).view(-1, 1)

    def send(self) -> None:
        self._device[: self._used].copy_(self._host[: self._used], non_blocking=True)


class SamplingState:
    """The sampling parameters of the running requests, by slot.

    Args:
        num_slots: how many requests can run at once.
        vocab_size: the width of the logits, V.
        eos_token_ids: the model's end-of-sequence tokens.
        device: where the logits are.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device | str
    ) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.penalty_table: PenaltyTable | None = None  # made for the first request that has a penalty
        self._eos = frozenset(eos_token_ids)
        self._masked: dict[int, tuple[int, ...]] = {}
        self._keys = np.zeros(num_slots, np.int64)
        self._min_tokens = np.zeros(num_slots, np.int64)
        self._top_k = np.zeros(num_slots, np.int64)
        self._logprobs = np.full(num_slots, -1, np.int64)
        self._random = np.zeros(num_slots, np.bool_)
        self._plain = np.ones(num_slots, np.bool_)
        self._penalised = np.zeros(num_slots, np.bool_)
        self._temperature = np.ones(num_slots, np.float32)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._penalties = np.zeros((3, num_slots), np.float32)

    def add(
        self,
        slot: int,
        params: SamplingParams,
        key: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Gives a slot to a request. Output tokens are those of a request that comes back after a preemption.

        Args:
            key: from `sampling_key`.

        Raises:
            InvalidSamplingParams: if a stop token or the number of logprobs exceeds the vocabulary.
            ValueError: if there is no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot must be in [0, {self.num_slots}), got {slot}")
        params.check_vocab(self.vocab_size)
        random = not params.greedy
        self._keys[slot] = np.uint64(key).astype(np.int64)
        self._random[slot] = random
        # Greedy rows leave the filters alone: the most probable token passes them all.
        self._temperature[slot] = params.temperature if random else 1.0
        self._top_k[slot] = params.top_k if random and 0 < params.top_k < self.vocab_size else 0
        self._top_p[slot] = params.top_p if random else 1.0
        self._min_p[slot] = params.min_p if random else 0.0
        self._min_tokens[slot] = params.min_tokens
        self._masked[slot] = masked_below_min_tokens(params, self._eos)
        wanted = -1 if params.logprobs is None else params.logprobs
        self._logprobs[slot] = self.vocab_size if params.logprobs == -1 else wanted
        self._penalised[slot] = params.has_penalties
        filtered = self._top_k[slot] > 0 or self._top_p[slot] < 1.0 or self._min_p[slot] > 0.0
        self._plain[slot] = not (filtered or params.has_penalties or wanted != -1)
        if params.has_penalties:
            self._penalties[:, slot] = (
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
            if self.penalty_table is None:
                self.penalty_table = PenaltyTable(self.num_slots, self.vocab_size, self.device)
            self.penalty_table.reset(slot, prompt_token_ids, output_token_ids)

    def plain(self, slots: IntArray, positions: IntArray) -> bool:
        """Whether no row asks for more than a temperature, so that the fused kernel can sample them."""
        return bool(self._plain[slots].all()) and bool((positions >= self._min_tokens[slots]).all())

    def temperature_and_keys(self, slots: IntArray) -> tuple[npt.NDArray[np.float32], IntArray]:
        """Of plain rows: each one's temperature, 0 if it is greedy, and its key."""
        return np.where(self._random[slots], self._temperature[slots], np.float32(0.0)), self._keys[slots]

    def batch(self, slots: Sequence[int] | IntArray, positions: Sequence[int] | IntArray) -> SamplingBatch:
        """The rows of one step, in the order of the logits' rows.

        Args:
            slots: the slot of each row; no slot twice.
            positions: how many output tokens each row's request has been given before this one, those in flight
                included. It numbers the draw, so a request that is computed anew draws the same tokens again.

        Raises:
            ValueError: if slots and positions differ in length or are empty.
        """
        slot = np.asarray(slots, dtype=np.int64)
        position = np.asarray(positions, dtype=np.int64)
        if slot.size == 0 or slot.shape != position.shape:
            raise ValueError(f"slots and positions must be as many, at least one; got {slot.size} and {position.size}")
        return _BatchBuilder(self, slot, position).build()


class _BatchBuilder:
    """Builds one `SamplingBatch`: what any row uses is decided here, on the host."""

    def __init__(self, state: SamplingState, slot: IntArray, position: IntArray) -> None:
        self._state = state
        self._slot = slot
        self._position = position
        self._pairs = self._masked_pairs()
        rows = len(slot)
        # Integers: keys, positions, filter rows, top-k, penalty rows and slots, logprob rows; then the pairs.
        self._ints = _Upload(torch.int64, 7 * rows + 3 * len(self._pairs), state.device)
        # Floats: temperature, noise scale, min-p, top-p, three penalties.
        self._floats = _Upload(torch.float32, 7 * rows, state.device)

    def build(self) -> SamplingBatch:
        state, slot = self._state, self._slot
        random, heat, min_p = state._random[slot], state._temperature[slot], state._min_p[slot]
        mixed = bool(random.any()) and not bool(random.all())
        with np.errstate(divide="ignore"):
            log_min_p = np.log(min_p)
        batch = SamplingBatch(
            num_rows=len(slot),
            any_random=bool(random.any()),
            keys=self._ints.add(state._keys[slot]),
            positions=self._ints.add(self._position),
            temperature=self._floats.column(heat) if (heat != 1.0).any() else None,
            noise_scale=self._floats.column(random.astype(np.float32)) if mixed else None,
            log_min_p=self._floats.column(log_min_p) if (min_p > 0.0).any() else None,
            filters=self._filters(),
            penalties=self._penalties(),
            min_tokens=self._min_tokens(),
            logprobs=self._logprobs(),
        )
        self._ints.send()
        self._floats.send()
        return batch

    def _rows(self, rows: IntArray) -> Tensor | None:
        return None if len(rows) == len(self._slot) else self._ints.add(rows)

    def _filters(self) -> tuple[FilterRows, ...]:
        top_k, top_p = self._state._top_k[self._slot], self._state._top_p[self._slot]
        groups = []
        for rows in (np.flatnonzero(top_k > 0), np.flatnonzero((top_k == 0) & (top_p < 1.0))):
            if rows.size:
                k, p = top_k[rows], top_p[rows]
                groups.append(
                    FilterRows(
                        rows=self._rows(rows),
                        top_k=self._ints.column(k) if k[0] > 0 else None,
                        max_top_k=int(k.max()),
                        top_p=self._floats.column(p) if (p < 1.0).any() else None,
                    )
                )
        return tuple(groups)

    def _penalties(self) -> PenaltyRows | None:
        table = self._state.penalty_table
        rows = np.flatnonzero(self._state._penalised[self._slot])
        if table is None or not rows.size:
            return None
        slots = self._slot[rows]
        repetition, presence, frequency = (self._floats.column(p[slots]) for p in self._state._penalties)
        return PenaltyRows(table, self._rows(rows), self._ints.add(slots), repetition, presence, frequency)

    def _masked_pairs(self) -> list[tuple[int, int, int]]:
        minimum = self._state._min_tokens[self._slot]
        return [
            (row, token, int(minimum[row]))
            for row in np.flatnonzero(self._position < minimum).tolist()
            for token in self._state._masked[int(self._slot[row])]
        ]

    def _min_tokens(self) -> MinTokensMask | None:
        if not self._pairs:
            return None
        rows, tokens, minimum = np.array(self._pairs, dtype=np.int64).T
        return MinTokensMask(self._ints.add(rows), self._ints.add(tokens), self._ints.add(minimum))

    def _logprobs(self) -> LogprobRows | None:
        wanted = self._state._logprobs[self._slot]
        rows = np.flatnonzero(wanted >= 0)
        if not rows.size:
            return None
        return LogprobRows(self._rows(rows), tuple(rows.tolist()), int(wanted.max()))
