"""What ranks exchange by kernels of ours: on what the others send, which is made here by hand or by a process."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from runtime.parallel.exchange import MAX_DRAWS, Exchange
from runtime.parallel.shard import Shard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def numbered(x: Tensor, sequence: int) -> Tensor:
    """What a rank sends of its x [T, H]: int64 words, the low half four bytes of x, the high half the number."""
    words = x.view(torch.int32).long() & 0xFFFFFFFF
    return (words | (sequence << 32)).flatten()


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether these are the numbers, rounded; Triton's interpreter cuts bfloat16 off instead."""
    if got.dtype == torch.bfloat16 and DEVICE == "cpu":
        wanted = (wanted.float().view(torch.int32) & -65536).view(torch.float32)
    return torch.equal(got, wanted.to(got.dtype))


class Ranks:
    """The exchanges of one rank with `size - 1` others that have always sent already."""

    def __init__(self, rank: int, size: int, hidden: int, dtype: torch.dtype, max_rows: int) -> None:
        words = hidden * dtype.itemsize // 4
        shape = (size, 2, max_rows * words + 2 * MAX_DRAWS)
        self.inboxes = [torch.zeros(shape, dtype=torch.int64, device=DEVICE) for _ in range(size)]
        self.rank, self.size, self.count = rank, size, [0] * max_rows
        self.sums = Exchange(Shard(rank, size), self.inboxes, hidden, dtype, max_rows)

    def run(self, x: list[Tensor], residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As from the ranks' x; checks what was sent to the others."""
        rows, width = x[0].shape[0], x[0][0].nbytes // 4
        for row in range(rows):
            self.count[row] += 1
            place = self.count[row] % 2, slice(row * width, (row + 1) * width)
            for sender in range(self.size):
                if sender != self.rank:
                    self.inboxes[self.rank][sender][place] = numbered(x[sender][row], self.count[row])
        found = self.sums.add_norm_(x[self.rank], residual, weight, EPS)
        for row in range(rows):
            place = self.count[row] % 2, slice(row * width, (row + 1) * width)
            for peer in range(self.size):
                if peer != self.rank:
                    assert torch.equal(
                        self.inboxes[peer][self.rank][place], numbered(x[self.rank][row], self.count[row])
                    )
        return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "hidden"), [(2, 64), (3, 576)])
def test_the_residual_takes_the_sum_of_all_ranks_and_the_norm_is_of_that(
    size: int, hidden: int, dtype: torch.dtype
) -> None:
    weight = numbers(hidden, dtype=dtype, seed=9)
    exchanges = [Ranks(rank, size, hidden, dtype, 4) for rank in range(size)]
    for step, rows in enumerate((2, 4, 1, 4)):  # so that rows have been used differently often
        x = [numbers(rows, hidden, dtype=dtype, seed=10 * step + rank) for rank in range(size)]
        residual = None if step == 0 else numbers(rows, hidden, dtype=dtype, seed=10 * step + 9)
        wanted = sum(one.float() for one in x) + (0 if residual is None else residual.float())
        found = [one.run(x, None if residual is None else residual.clone(), weight) for one in exchanges]
        for normed, total in found:
            assert same(total, wanted)
            expected = F.rms_norm(total.float(), (hidden,), weight.float(), EPS)
            assert float((normed.float() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
            assert torch.equal(normed, found[0][0])  # bit for bit on every rank


def test_what_has_the_number_of_an_earlier_exchange_is_not_taken_for_this_one() -> None:
    """A word of the last exchange but one lies where this one's is to come, until it comes."""
    one = Ranks(0, 2, 64, torch.float32, 1)
    weight = numbers(64, dtype=torch.float32, seed=0)
    for step in range(3):
        one.run([numbers(1, 64, dtype=torch.float32, seed=step + k) for k in (10, 20)], None, weight)
    x = numbers(1, 64, dtype=torch.float32, seed=5)
    one.sums._broken.fill_(1)  # nobody sends any more: without this it would wait for ever
    before = one.inboxes[0].clone()
    one.sums.add_norm_(x, None, weight, EPS)
    assert torch.equal(before, one.inboxes[0])
    assert one.sums._sums.counters[0] == 4


def test_numbers_that_have_wrapped_around_are_still_told_apart() -> None:
    one = Ranks(1, 2, 64, torch.bfloat16, 1)
    weight = numbers(64, dtype=torch.bfloat16, seed=0)
    one.sums._sums.counters.fill_(2**31 - 3)
    for step in range(4):
        number = 2**31 - 2 + step
        one.count = [number - 1 if number < 2**31 else number - 1 - 2**32]
        x = [numbers(1, 64, dtype=torch.bfloat16, seed=2 * step + k) for k in range(2)]
        _, total = one.run(x, None, weight)
        assert same(total, x[0].float() + x[1].float())


def test_more_rows_than_there_is_room_for_are_not_served() -> None:
    sums = Ranks(0, 2, 64, torch.float32, 4).sums
    assert [sums.serves(torch.empty(rows, 64)) for rows in (0, 1, 4, 5)] == [False, True, True, False]


@pytest.mark.parametrize("rank", range(3))
def test_the_token_drawn_is_the_best_of_all_ranks_and_of_equal_ones_the_smallest(rank: int) -> None:
    one = Ranks(rank, 3, 64, torch.float32, 1)
    part, vocab = 100, 295
    for step in range(1, 4):
        scores = numbers(3, 3, 4, dtype=torch.float32, seed=step).round(decimals=0)  # [rank, row, chunk], with ties
        tokens = torch.randint(0, 95, (3, 3, 4), generator=torch.Generator().manual_seed(step), dtype=torch.int32)
        scores[2, 2] = torch.nan  # a part that overflows draws nothing
        tokens = tokens.to(DEVICE)
        best = []
        for sender in range(3):
            for row in range(3):
                score = scores[sender, row].max()
                ties = tokens[sender, row][scores[sender, row] == score]
                best.append((sender, row, score, int(ties.min()) + sender * part if len(ties) else vocab - 1))
        for sender, row, score, token in best:
            if sender != rank:
                pair = torch.stack((score, torch.tensor(token, dtype=torch.int32, device=DEVICE).view(torch.float32)))
                place = slice(one.inboxes[rank].shape[2] - 2 * MAX_DRAWS + 2 * row, None)
                one.inboxes[rank][sender][step % 2][place][:2] = numbered(pair, step)
        out = torch.empty(3, dtype=torch.int64, device=DEVICE)
        assert one.sums.merge_draws(scores[rank], tokens[rank], rank * part, vocab, out)
        wanted = []
        for row in range(3):
            candidates = [(-float(score), token) for _, r, score, token in best if r == row and not score.isnan()]
            wanted.append(min(candidates)[1])
        assert out.tolist() == wanted


def test_draws_of_more_rows_than_there_is_room_for_are_left_to_others() -> None:
    one = Ranks(0, 2, 64, torch.float32, 1)
    empty = torch.empty(MAX_DRAWS + 1, 1)
    assert not one.sums.merge_draws(empty, empty.int(), 0, 10, torch.empty(MAX_DRAWS + 1, dtype=torch.int64))


def take_part(rank: int, inboxes: list[Tensor], lateness: list[float], totals: Tensor) -> None:
    """One of two ranks that exchange rows for real: its x is rank + step."""
    ours = Exchange(Shard(rank, 2), inboxes, 64, torch.float32, 2)
    for step, seconds in enumerate(lateness):
        time.sleep(seconds)
        x = torch.full((2, 64), float(rank + step))
        totals[rank, step] = ours.add_norm_(x, None, torch.ones(64), EPS)[1]


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels of two processes: benchmarks.sums has that for cards")
def test_a_rank_waits_for_one_that_is_late() -> None:
    inboxes = [torch.zeros(2, 2, 128 + 2 * MAX_DRAWS, dtype=torch.int64).share_memory_() for _ in range(2)]
    totals = torch.zeros(2, 4, 2, 64).share_memory_()
    late = [0.0, 0.1, 0.0, 0.1], [0.1, 0.0, 0.0, 0.0]
    other = multiprocessing.get_context("fork").Process(target=take_part, args=(1, inboxes, late[1], totals))
    other.start()
    take_part(0, inboxes, late[0], totals)
    other.join(60)
    assert other.exitcode == 0
    assert totals[:, :, 0, 0].tolist() == [[1.0, 3.0, 5.0, 7.0]] * 2
