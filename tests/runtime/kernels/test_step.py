"""The kernels that unpack a step, against the same in PyTorch's own operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.device_state import Arrived, DeviceState, StepRows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
INPUTS = ("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens")


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def pair() -> tuple[DeviceState, DeviceState]:
    """By kernels, and by PyTorch."""
    fused, plain = (DeviceState(6, 100, 8, DEVICE, fused=fused) for fused in (True, False))
    return fused, plain


def same(name: str, fused: Tensor, plain: Tensor) -> None:
    assert torch.equal(fused.cpu(), plain.cpu()), name


STEP = StepRows(
    new_blocks=np.array([[4, column, 40 + column] for column in range(5)] + [[2, 0, 7], [1, 0, 3], [1, 1, 90]]),
    slots=ints(1, 4, 2),
    starts=ints(9, 3, 0),
    lengths=ints(1, 30, 5),
    sampled_rows=ints(0, 2),
    draws=ints(4, 0),
    num_decodes=1,
)
ARRIVED = [Arrived(4, list(range(100, 140))), Arrived(2, [9, 8, 7, 6, 5]), Arrived(1, list(range(10)))]


def test_a_step_is_unpacked_as_pytorch_would() -> None:
    states = pair()
    for state in states:
        state.send(STEP, ARRIVED)
        state.apply_blocks()
    fused, plain = (state.inputs_of(STEP) for state in states)
    for name in INPUTS:
        same(name, getattr(fused, name), getattr(plain, name))
    for seq, length in enumerate(STEP.ends.tolist()):
        columns = -(-length // 8)
        same("block_table", fused.block_table[seq, :columns], plain.block_table[seq, :columns])
    assert fused.input_ids.tolist() == [9, *range(103, 133), 9, 8, 7, 6, 5]
    for state in states:
        state.store(torch.tensor([77, 78], device=DEVICE))
    same("tokens", states[0].tokens, states[1].tokens)
    assert [int(states[0].tokens[1, 10]), int(states[0].tokens[2, 5])] == [77, 78]


def test_padding_reads_nothing_and_writes_nothing() -> None:
    state, _ = pair()
    decodes = StepRows(np.array([[3, 0, 5]]), ints(3), ints(6), ints(1), ints(0), ints(2), 1)
    temperature, keys = np.array([0.5], np.float32), ints(-(2**63) + 5)
    state.send(decodes, [Arrived(3, [1, 2, 3, 4, 5, 6, 7])], temperature, keys, padded=(4, 4))
    state.apply_blocks()
    inputs = state.captured_decodes(4)
    assert inputs.input_ids.tolist() == [7, 0, 0, 0]
    assert inputs.positions.tolist() == [6, 0, 0, 0]
    assert inputs.slot_mapping.tolist() == [46, -1, -1, -1]
    assert inputs.seq_lens.tolist() == [7, 0, 0, 0]
    assert inputs.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert state.part("temperature", 4).tolist() == [0.5, 0, 0, 0]
    assert state.part("keys", 1).tolist() == keys.tolist()
    before = state.tokens.clone()
    state.store(torch.tensor([60, 61, 62, 63], device=DEVICE))
    changed = (state.tokens != before).nonzero().tolist()
    assert changed == [[3, 7]]


def test_a_step_of_padding_alone_has_valid_tokens() -> None:
    state, _ = pair()
    state.send(STEP, ARRIVED)
    state.send_padding(5, 5)
    inputs = state.captured_decodes(5)
    assert inputs.input_ids.tolist() == [0] * 5
    assert inputs.slot_mapping.tolist() == [-1] * 5
    state.send_padding(state.max_seqs, 600)
    inputs = state.captured_mixed(600)
    assert inputs.input_ids.tolist() == [0] * 600
    assert inputs.slot_mapping.tolist() == [-1] * 600


@pytest.mark.parametrize("padded", [36, 38, 100])  # no padding, less than sequences that pad, more than they
def test_a_step_with_chunks_is_padded_to_a_number_of_tokens(padded: int) -> None:
    state, plain = pair()
    state.send(STEP, ARRIVED, np.array([0.5, 0.0], np.float32), ints(1, 2), padded=(state.max_seqs, padded))
    plain.send(STEP, ARRIVED)
    for one in (state, plain):
        one.apply_blocks()
    inputs, real = state.captured_mixed(padded), plain.inputs_of(STEP)
    for name in ("input_ids", "positions", "slot_mapping"):
        same(name, getattr(inputs, name)[:36], getattr(real, name))
        assert getattr(inputs, name)[36:].tolist() == [-1 if name == "slot_mapping" else 0] * (padded - 36)
    assert inputs.seq_lens.tolist() == [*STEP.ends.tolist(), 0, 0, 0, 0]
    assert inputs.query_start_loc[:4].tolist() == [0, 1, 31, 36]
    assert int(inputs.query_start_loc[-1]) == padded
    assert inputs.decode_count is not None
    assert inputs.decode_count.tolist() == [1]
    assert state.part("sampled", 6).tolist() == [0, 35, 0, 0, 0, 0]
    before = state.tokens.clone()
    state.store(torch.arange(60, 66, device=DEVICE))
    assert (state.tokens != before).nonzero().tolist() == [[1, 10], [2, 5]]


@pytest.mark.parametrize("fused", [True, False])
def test_prompts_longer_than_the_buffer_arrive_whole(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.device_state._TAIL", 64)
    state = DeviceState(6, 100, 8, DEVICE, fused=fused)
    arrived = [Arrived(slot, [1000 * slot + i for i in range(90)]) for slot in range(6)]
    state.send(StepRows(STEP.new_blocks, *(getattr(STEP, n) for n in StepRows.__slots__[1:])), arrived)
    for new in arrived:
        assert state.tokens[new.slot, :90].tolist() == new.token_ids


@pytest.mark.parametrize("fused", [True, False])
def test_more_new_blocks_than_the_buffer_holds_are_all_entered(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.device_state._TAIL", 64)
    state = DeviceState(6, 100, 4, DEVICE, fused=fused)
    blocks = np.array([[slot, column, 100 * slot + column] for slot in range(6) for column in range(20)])
    arrived = [Arrived(slot, [1000 * slot + i for i in range(70)]) for slot in range(6)]
    state.send(StepRows(blocks, *(getattr(STEP, n) for n in StepRows.__slots__[1:])), arrived)
    state.apply_blocks()
    for new in arrived:
        assert state.block_tables[new.slot, :20].tolist() == [100 * new.slot + column for column in range(20)]
        assert state.tokens[new.slot, :70].tolist() == new.token_ids
