"""The sampling kernel draws the tokens that the `Sampler` draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.kernels.sample import sample
from runtime.sampling.batch import SamplingState
from runtime.sampling.noise import vocab_hash
from runtime.sampling.params import SamplingParams
from runtime.sampling.sampler import Sampler
from tests.runtime.test_shards import draw_from_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INFINITY = float("inf")


def fused(logits: Tensor, temperature: list[float], keys: list[int], positions: list[int]) -> list[int]:
    out = torch.full((len(logits),), -7, dtype=torch.int64, device=DEVICE)
    sample(
        logits,
        torch.tensor(temperature, device=DEVICE),
        torch.tensor(keys, device=DEVICE),
        torch.tensor(positions, device=DEVICE),
        vocab_hash(logits.shape[1], torch.device(DEVICE)),
        out,
    )
    return out.tolist()


def reference(logits: Tensor, temperature: list[float], keys: list[int], positions: list[int]) -> list[int]:
    rows, vocab = logits.shape
    state = SamplingState(rows, vocab, (), DEVICE)
    for row in range(rows):
        state.add(row, SamplingParams(temperature=temperature[row]), keys[row] % 2**64, ())
    batch = state.batch(range(rows), positions)
    return Sampler(vocab, DEVICE)(logits.float().clone(), batch).token_ids.tolist()


def random_draws(rows: int, seed: int) -> tuple[list[float], list[int], list[int]]:
    """Temperatures, one row in four greedy; keys over the whole of int64; positions."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([0.0, 0.3, 1.0, 1.7])
    temperature = choices[torch.arange(rows) % 4].tolist()
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).tolist()
    positions = torch.randint(100_000, (rows,), generator=generator).tolist()
    return temperature, keys, positions


def random_logits(rows: int, vocab: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3))).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.0, torch.float32), (3.0, torch.float32), (3.0, torch.float16), (3.0, torch.bfloat16)]
)
def test_tokens_are_those_of_the_sampler(scale: float, dtype: torch.dtype) -> None:
    # All are equal, also where the interpreter's logarithms are a rounding away from torch's.
    logits = random_logits(64, 5000, scale, dtype)
    draws = random_draws(64, seed=0)
    assert fused(logits, *draws) == reference(logits, *draws)


def test_a_single_row_is_cut_finer_and_draws_the_same() -> None:
    logits = random_logits(8, 9001, 2.0)
    temperature, keys, positions = random_draws(8, seed=1)
    together = fused(logits, temperature, keys, positions)
    alone = [fused(logits[i : i + 1], temperature[i : i + 1], keys[i : i + 1], positions[i : i + 1]) for i in range(8)]
    assert [token for tokens in alone for token in tokens] == together
    assert together == reference(logits, temperature, keys, positions)


def test_draws_change_with_the_position_and_with_the_key() -> None:
    logits = torch.zeros(3, 1000, device=DEVICE)
    first, moved, other = fused(logits, [1.0] * 3, [5, 5, 6], [0, 1, 0])
    assert len({first, moved, other}) == 3


def test_the_smallest_of_equal_greedy_tokens_wins() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[0, [8999, 4500, 17]] = 2.0
    logits[1, [8999, 4500]] = 2.0
    assert fused(logits, [0.0] * 3, [1, 2, 3], [0, 0, 0]) == [17, 4500, 0]


def test_masked_entries_are_never_drawn() -> None:
    logits = torch.full((4, 9000), -INFINITY, device=DEVICE)
    logits[:, 8000] = -5.0
    logits[3, 8000] = -INFINITY
    assert fused(logits, [1.0, 0.01, 0.0, 1.0], [1, 2, 3, 4], [0] * 4) == [8000, 8000, 8000, 0]


def test_an_infinite_logit_is_drawn() -> None:
    logits = torch.zeros(2, 3000, device=DEVICE)
    logits[:, 2500] = INFINITY
    assert fused(logits, [1.0, 0.0], [1, 2], [0, 0]) == [2500, 2500]


def test_scores_that_float32_cannot_tell_apart_go_to_the_smallest_token() -> None:
    # At 1e9 the noise is below half a unit in the last place: every entry is a candidate, and all are equal.
    logits = torch.full((1, 100), 1e7, device=DEVICE)
    assert fused(logits, [0.01], [1], [0]) == [0]


def test_rows_of_logits_may_be_spaced() -> None:
    logits = random_logits(5, 700, 1.0)
    draws = random_draws(5, seed=2)
    assert fused(logits[:, :600], *draws) == reference(logits[:, :600].contiguous(), *draws)


def test_a_row_that_is_no_number_still_gives_a_token_of_the_vocabulary() -> None:
    logits = torch.full((2, 5000), float("nan"), device=DEVICE)
    assert all(0 <= token < 5000 for token in fused(logits, [0.0, 1.0], [1, 2], [0, 0]))


def test_no_rows_are_left_alone() -> None:
    assert fused(torch.empty(0, 100, device=DEVICE), [], [], []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("scale", [0.0, 2.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128256), (16, 151936), (512, 151936)])
def test_real_vocabularies_draw_the_same_on_a_card(rows: int, vocab: int, scale: float) -> None:
    logits = random_logits(rows, vocab, scale, torch.bfloat16)
    draws = random_draws(rows, seed=4)
    assert fused(logits, *draws) == reference(logits, *draws)


@pytest.mark.skipif(DEVICE != "cpu", reason="it draws on the CPU, by Triton's interpreter")
@pytest.mark.parametrize("seed", range(3))
def test_tokens_drawn_from_parts_of_the_vocabulary_are_those_drawn_from_the_whole(seed: int) -> None:
    alone, together, best = draw_from_parts(seed, fused=True)
    assert together == alone == draw_from_parts(seed, fused=False)[0]
    assert alone[0] == best
