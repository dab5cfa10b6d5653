"""What lasts from step to step on the device: each running request's tokens and block table, by slot.

A step sends one int32 buffer in one copy. At its head, in rows of `num_slots`, lies what every step has; behind it
what only some have: entries of block tables, and the tokens of requests that got a slot. The head lies at fixed places,
so that captured graphs find it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.forward import ForwardInputs

Ints = npt.NDArray[np.int64]
_ALIGN = 32
_RING = 4
_TAIL = 1 << 18


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request that gets a slot with this step: its known tokens."""

    slot: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step as arrays: row i is `lengths[i]` tokens from position `starts[i]` on of the request in `slots[i]`.

    `sampled_rows` are the rows that sample, and `draws` counts the output tokens before each one's. The first
    `num_decodes` rows have one token each. `new_blocks` is [N, 3]: slot, column, block id.
    """

    new_blocks: Ints
    slots: Ints
    starts: Ints
    lengths: Ints
    sampled_rows: Ints
    draws: Ints
    num_decodes: int

    @property
    def ends(self) -> Ints:
        """Tokens of each row's request once the step's are in."""
        return self.starts + self.lengths


@dataclass(slots=True)
class Staging:
    """One buffer on the host, and when the device has read it."""

    host: Tensor
    array: npt.NDArray[np.int32]
    read: torch.cuda.Event | None


class DeviceState:
    """Tokens [num_slots, max_model_len + 1] and block tables [num_slots, columns], int32, on the device.

    `fused`: by Triton kernels, as on a card; else by PyTorch's own operations, some of which wait for the device.
    """

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, device: torch.device, *, fused: bool
    ) -> None:
        self.device = device
        self._kernels: ModuleType | None = None
        if fused:
            from runtime.kernels import launch, step  # Triton is optional

            self._kernels, self._pdl = step, launch.use_pdl(device)
        self.num_slots = num_slots
        self.block_size = block_size
        self.columns = -(-max_model_len // block_size) + 1
        self.tokens = torch.zeros(num_slots, max_model_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, self.columns, dtype=torch.int32, device=device)
        self.max_seqs = num_slots + 1  # the last of a padded step with chunks is padding
        row = -(-(self.max_seqs + 1) // _ALIGN) * _ALIGN
        names = ("slots", "starts", "query_start", "sampled", "sampled_slots", "sampled_ends", "draws", "temperature")
        self.at = {name: _ALIGN + i * row for i, name in enumerate(names)}
        self.at["keys"] = _ALIGN + len(names) * row  # int64: two places each
        self.head = self.at["keys"] + 2 * row
        self.upload = torch.zeros(self.head + _TAIL, dtype=torch.int32, device=device)
        cuda = device.type == "cuda"
        hosts = [torch.zeros(self.head + _TAIL, dtype=torch.int32, pin_memory=cuda) for _ in range(_RING)]
        self._ring = [Staging(host, host.numpy(), torch.cuda.Event() if cuda else None) for host in hosts]
        self._next = 0

    def part(self, name: str, count: int) -> Tensor:
        """A row of the head on the device, [count]; `keys` int64, `temperature` float32, the others int32."""
        start = self.at[name]
        if name == "keys":
            return self.upload[start : start + 2 * count].view(torch.int64)
        part = self.upload[start : start + count]
        return part.view(torch.float32) if name == "temperature" else part

    def send(
        self,
        rows: StepRows,
        arrived: list[Arrived],
        temperature: npt.NDArray[np.float32] | None = None,
        keys: Ints | None = None,
        *,
        padded: tuple[int, int] | None = None,
    ) -> None:
        """Bring a step to the device, padded to `padded` sequences and tokens.

        Padding sequences have one token each for as long as there are any; the last has what is left. Tokens of
        arrivals are put in their slots. Block ids wait in the buffer for `apply_blocks`; where they are more than half
        of it holds, the first of them are applied at once.
        """
        blocks, at_once = rows.new_blocks, _TAIL // 6
        while len(blocks) > at_once:
            self._send_blocks(blocks[:at_once])
            blocks = blocks[at_once:]
        pieces = list(self._pieces(arrived, _TAIL // 2))
        for early in pieces[:-1]:
            self._send_tokens(early)
        staging = self._staging()
        array, at, count = staging.array, self.at, len(rows.slots)
        num_seqs, num_tokens = padded or (count, int(rows.lengths.sum()))
        array[2] = rows.num_decodes
        array[at["slots"] : at["slots"] + num_seqs] = -1
        array[at["slots"] : at["slots"] + count] = rows.slots
        array[at["starts"] : at["starts"] + num_seqs] = 0
        array[at["starts"] : at["starts"] + count] = rows.starts
        offsets = array[at["query_start"] : at["query_start"] + num_seqs + 1]
        offsets[0] = 0
        np.cumsum(rows.lengths, out=offsets[1 : count + 1])
        offsets[count + 1 :] = np.minimum(offsets[count] + np.arange(1, num_seqs - count + 1), num_tokens)
        offsets[-1] = num_tokens
        chosen, num = rows.sampled_rows, len(rows.sampled_rows)
        array[at["sampled"] : at["sampled"] + num_seqs] = 0
        array[at["sampled"] : at["sampled"] + num] = offsets[1:][chosen] - 1
        array[at["sampled_slots"] : at["sampled_slots"] + num_seqs] = -1
        array[at["sampled_slots"] : at["sampled_slots"] + num] = rows.slots[chosen]
        array[at["sampled_ends"] : at["sampled_ends"] + num] = rows.ends[chosen]
        array[at["draws"] : at["draws"] + num] = rows.draws
        floats = array[at["temperature"] : at["temperature"] + num_seqs].view(np.float32)
        floats[:] = 0.0
        if temperature is not None and keys is not None:
            floats[:num] = temperature
            array[at["keys"] : at["keys"] + 2 * num].view(np.int64)[:] = keys
        tokens_at = used = self._place_blocks(blocks, array)
        if pieces:
            used = self._place(pieces[-1], array, tokens_at)
        self._copy(staging, used)
        if pieces:
            self._scatter_tokens(pieces[-1], tokens_at, staging)

    def send_padding(self, num_seqs: int, num_tokens: int) -> None:
        """Bring a step of nothing but padding to the device, as a graph's first run and capture need one."""
        none = np.empty(0, np.int64)
        self.send(StepRows(none.reshape(0, 3), none, none, none, none, none, 0), [], padded=(num_seqs, num_tokens))

    def _staging(self) -> Staging:
        staging = self._ring[self._next]
        self._next = (self._next + 1) % _RING
        if staging.read is not None:
            staging.read.synchronize()
        return staging

    def _copy(self, staging: Staging, used: int) -> None:
        self.upload[:used].copy_(staging.host[:used], non_blocking=True)
        if staging.read is not None:
            staging.read.record()

    def _place_blocks(self, blocks: Ints, array: npt.NDArray[np.int32]) -> int:
        """Entries of block tables behind the head; returns where they end."""
        end = self.head + blocks.size
        array[0], array[1] = len(blocks), self.head
        array[self.head : end] = blocks.reshape(-1)
        return end

    def _send_blocks(self, blocks: Ints) -> None:
        staging = self._staging()
        self._copy(staging, self._place_blocks(blocks, staging.array))
        self.apply_blocks()

    # Tokens of arrivals: (slot, first position, token ids) each

    def _pieces(self, arrived: list[Arrived], room: int) -> Iterator[list[tuple[int, int, list[int]]]]:
        """Arrivals in buffers: all in one unless that is too small."""
        piece: list[tuple[int, int, list[int]]] = []
        left = room
        for new in arrived:
            first = 0
            while first < len(new.token_ids):
                if left < 5:
                    yield piece
                    piece, left = [], room
                ids = new.token_ids[first : first + left - 4]
                piece.append((new.slot, first, ids))
                first, left = first + len(ids), left - 4 - len(ids)
        if piece:
            yield piece

    def _place(self, piece: list[tuple[int, int, list[int]]], array: npt.NDArray[np.int32], start: int) -> int:
        source = start + 4 * len(piece)
        for i, (slot, first, ids) in enumerate(piece):
            array[start + 4 * i : start + 4 * i + 4] = slot, first, len(ids), source
            array[source : source + len(ids)] = ids
            source += len(ids)
        return source

    def _send_tokens(self, piece: list[tuple[int, int, list[int]]]) -> None:
        staging = self._staging()
        self._copy(staging, self._place(piece, staging.array, self.head))
        self._scatter_tokens(piece, self.head, staging)

    def _scatter_tokens(self, piece: list[tuple[int, int, list[int]]], start: int, staging: Staging) -> None:
        if self._kernels is not None:
            longest = max(len(ids) for _, _, ids in piece)
            grid = (len(piece), -(-longest // 1024))
            self._kernels.scatter_tokens[grid](self.upload, self.tokens, start, self.tokens.stride(0), BLOCK=1024)
            return
        for slot, first, count, source in staging.host[start : start + 4 * len(piece)].view(-1, 4).tolist():
            self.tokens[slot, first : first + count] = self.upload[source : source + count]

    # On the device alone: what follows can be captured in a graph

    def apply_blocks(self) -> None:
        """Enter the new block ids of the step that was sent."""
        if self._kernels is not None:
            self._kernels.scatter_blocks[(1,)](
                self.upload, self.block_tables, COLUMNS=self.columns, COUNT_AT=0, BLOCK=1024, num_warps=4
            )
            return
        count, source = self.upload[:2].tolist()
        slot, column, block = self.upload[source : source + 3 * count].view(-1, 3).long().T
        self.block_tables[slot, column] = block.int()

    def inputs_of(self, rows: StepRows) -> ForwardInputs:
        """The model's inputs of the step that was sent."""
        lengths, ends = rows.lengths.tolist(), rows.ends.tolist()
        inputs = self._expand(sum(lengths), len(lengths), max(lengths))
        inputs.host_query_lens, inputs.host_seq_lens = lengths, ends
        inputs.num_decodes = rows.num_decodes
        return inputs

    def captured_decodes(self, size: int) -> ForwardInputs:
        """The model's inputs of whatever step of `size` decodes, padding included, was sent."""
        inputs = self._expand(size, size, 1)
        inputs.num_decodes = size
        return inputs

    def captured_mixed(self, num_tokens: int) -> ForwardInputs:
        """The model's inputs of whatever step of `max_seqs` sequences and `num_tokens` tokens was sent."""
        inputs = self._expand(num_tokens, self.max_seqs, num_tokens)
        inputs.num_decodes = self.max_seqs
        inputs.decode_count = self.upload[2:3]
        return inputs

    def _expand(self, num_tokens: int, num_seqs: int, longest: int) -> ForwardInputs:
        device = self.device
        if self._kernels is None:
            return self._expand_by_torch(num_tokens, num_seqs)
        width = num_tokens + num_tokens % 2  # rows at 16 bytes: kernels are compiled for aligned tensors
        input_ids, positions, slot_mapping = torch.empty(3, width, dtype=torch.int64, device=device)[:, :num_tokens]
        seq_lens = torch.empty(num_seqs, dtype=torch.int32, device=device)
        table = torch.empty(num_seqs, self.columns, dtype=torch.int32, device=device)
        block = 16 if longest == 1 else 256
        self._kernels.expand_rows[(num_seqs, -(-longest // block))](
            self.upload, self.tokens, self.tokens.stride(0), self.block_tables, input_ids, positions, slot_mapping,
            seq_lens, table, SLOTS_AT=self.at["slots"], STARTS_AT=self.at["starts"],
            QUERY_START_AT=self.at["query_start"], COLUMNS=self.columns, BLOCK_SIZE=self.block_size, BLOCK=block,
            PDL=self._pdl, num_warps=4, launch_pdl=self._pdl,
        )  # fmt: skip
        offsets = self.part("query_start", num_seqs + 1)
        return ForwardInputs(input_ids, positions, slot_mapping, offsets, seq_lens, table, None, None)

    def _expand_by_torch(self, num_tokens: int, num_seqs: int) -> ForwardInputs:
        slots, starts = self.part("slots", num_seqs).long(), self.part("starts", num_seqs).long()
        offsets = self.part("query_start", num_seqs + 1)
        lengths = offsets.diff().long()
        row = torch.repeat_interleave(torch.arange(num_seqs, device=self.device), lengths)
        positions = torch.arange(num_tokens, device=self.device) - offsets[row] + starts[row]
        slot = slots[row]
        blocks = self.block_tables[slot, positions // self.block_size].long()
        return ForwardInputs(
            input_ids=self.tokens[slot, positions].long(),
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            query_start_loc=offsets,
            seq_lens=(starts + lengths).int(),
            block_table=self.block_tables[slots],
            host_query_lens=None,
            host_seq_lens=None,
        )

    def store(self, sampled: Tensor) -> None:
        """Put sampled tokens [R] int64 where the next step reads them; R counts padding in a captured step."""
        count = len(sampled)
        if self._kernels is not None:
            self._kernels.store_tokens[(-(-count // 256),)](
                self.upload, sampled, self.tokens, self.tokens.stride(0), count, SLOTS_AT=self.at["sampled_slots"],
                POSITIONS_AT=self.at["sampled_ends"], BLOCK=256, PDL=self._pdl, num_warps=4, launch_pdl=self._pdl,
            )  # fmt: skip
            return
        slot, position = self.part("sampled_slots", count).long(), self.part("sampled_ends", count).long()
        self.tokens[slot, position] = sampled.int()
