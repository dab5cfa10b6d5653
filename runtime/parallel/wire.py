"""A step as rank 0 tells the others of it: numbers alone, int32 in one message, without request ids or text.

[STEP, copies, arrivals, new blocks, rows, sampled rows, decodes, plain, padded tokens or -1]
slots, starts, lengths (rows each); sampled rows, draws, temperatures (float32), keys (int64)
new blocks (3 each); out, count, device blocks, host blocks of each copy; slot, count, token ids of each arrival
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.device_state import Arrived, Ints, StepRows
from runtime.host_memory import Copy

STEP = 1
_HEAD = 9


class Copied(NamedTuple):
    """See `runtime.host_memory.Copy`."""

    out: bool
    device: tuple[int, ...]
    host: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step needs of the host, on every rank.

    `temperature` (0: greedy) and `keys` are of the rows that sample; `plain` says that these need nothing else.
    `padded_tokens` is the size of the captured graph that runs the step, if one does.
    """

    copies: Sequence[Copy]  # to host memory and back, before anything else
    arrived: list[Arrived]
    rows: StepRows
    temperature: npt.NDArray[np.float32]
    keys: Ints
    plain: bool
    padded_tokens: int | None


def pack(work: StepWork) -> npt.NDArray[np.int32]:
    """The message of a step."""
    rows, num, sampled = work.rows, len(work.rows.slots), len(work.rows.sampled_rows)
    size = _HEAD + 3 * num + 5 * sampled + rows.new_blocks.size
    size += sum(2 + 2 * len(copy.device) for copy in work.copies)
    size += sum(2 + len(new.token_ids) for new in work.arrived)
    message = np.empty(size, np.int32)
    padded = -1 if work.padded_tokens is None else work.padded_tokens
    message[:_HEAD] = (
        STEP, len(work.copies), len(work.arrived), len(rows.new_blocks), num, sampled, rows.num_decodes, work.plain,
        padded,
    )  # fmt: skip
    at = _HEAD
    for part in (
        rows.slots,
        rows.starts,
        rows.lengths,
        rows.sampled_rows,
        rows.draws,
        work.temperature.view(np.int32),
        work.keys.view(np.int32),
        rows.new_blocks.reshape(-1),
    ):
        message[at : at + len(part)] = part
        at += len(part)
    for copy in work.copies:
        count = len(copy.device)
        message[at : at + 2] = copy.out, count
        message[at + 2 : at + 2 + count] = copy.device
        message[at + 2 + count : at + 2 + 2 * count] = copy.host
        at += 2 + 2 * count
    for new in work.arrived:
        count = len(new.token_ids)
        message[at : at + 2] = new.slot, count
        message[at + 2 : at + 2 + count] = new.token_ids
        at += 2 + count
    return message


def unpack(message: bytes) -> StepWork:
    """The step of a message."""
    array = np.frombuffer(message, np.int32)
    _, copies, arrivals, blocks, num, sampled, decodes, plain, padded = array[:_HEAD].tolist()
    at = _HEAD

    def take(count: int) -> npt.NDArray[np.int32]:
        nonlocal at
        at += count
        return array[at - count : at]

    slots, starts, lengths = (take(num).astype(np.int64) for _ in range(3))
    sampled_rows, draws = (take(sampled).astype(np.int64) for _ in range(2))
    temperature, keys = take(sampled).view(np.float32), take(2 * sampled).copy().view(np.int64)
    new_blocks = take(3 * blocks).astype(np.int64).reshape(-1, 3)
    moved = []
    for _ in range(copies):
        out, count = take(2).tolist()
        moved.append(Copied(bool(out), tuple(take(count).tolist()), tuple(take(count).tolist())))
    arrived = []
    for _ in range(arrivals):
        slot, count = take(2).tolist()
        arrived.append(Arrived(slot, take(count).tolist()))
    rows = StepRows(new_blocks, slots, starts, lengths, sampled_rows, draws, decodes)
    return StepWork(moved, arrived, rows, temperature, keys, bool(plain), None if padded < 0 else padded)
