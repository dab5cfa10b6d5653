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
    state.send(decodes, [Arrived(3, [1, 2, 3, 4, 5, 6, 7])], temperature, keys, padded=4)
    state.apply_blocks()
    inputs = state.captured_inputs(4)
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
    state.send_padding(5)
    inputs = state.captured_inputs(5)
    assert inputs.input_ids.tolist() == [0] * 5
    assert inputs.slot_mapping.tolist() == [-1] * 5


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
