"""The counter-based stream: known answers, independence of order, and the two forms agreeing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from policies.random_stream import RandomStream, philox4x32

IDS = st.one_of(st.integers(0, 2**64 - 1), st.text(max_size=20))
COUNTERS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("block", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_published_with_it(block, key, answer):
    assert philox4x32(block, key) == answer


def test_the_draws_of_a_seed_never_change_between_versions():
    stream = RandomStream(7, "power-of-two")
    drawn = [stream.uint64(0), stream.uint64(0, 1), stream.uint64("chat-12", 3)]
    assert drawn == [3387986153480457963, 1022708034756870318, 6281973817918060495]


@settings(deadline=None)
@given(st.integers(), st.text(max_size=10), st.lists(IDS, min_size=1, max_size=8), COUNTERS)
def test_the_array_form_gives_the_scalar_draws(seed, name, ids, counter):
    stream = RandomStream(seed, name)
    counters = np.array([(counter + i) % 2**64 for i in range(len(ids))], dtype=np.uint64)
    scalar = [stream.uint64(i, int(c)) for i, c in zip(ids, counters, strict=True)]
    assert stream.uint64_array(ids, counters).tolist() == scalar
    floats = [stream.uniform(i, int(c)) for i, c in zip(ids, counters, strict=True)]
    assert stream.uniform_array(ids, counters).tolist() == floats
    one = stream.uint64_array(ids[0], counters)
    assert one.tolist() == [stream.uint64(ids[0], int(c)) for c in counters]


@settings(deadline=None)
@given(st.lists(st.tuples(IDS, st.integers(0, 50)), min_size=2, max_size=20), st.randoms())
def test_order_and_company_change_nobodys_draw(draws, shuffler):
    alone = {draw: RandomStream(1, "x").uint64(*draw) for draw in draws}
    shuffled = list(draws)
    shuffler.shuffle(shuffled)
    stream = RandomStream(1, "x")
    assert {draw: stream.uint64(*draw) for draw in shuffled} == alone


def test_another_process_with_another_hash_seed_draws_the_same():
    code = (
        "import json; from policies.random_stream import RandomStream as R;"
        "s = R(-3, 'router'); print(json.dumps([s.uint64('a', 1), s.uint64(9, 2), s.uniform('b')]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    stream = RandomStream(-3, "router")
    assert [json.loads(o) for o in outputs] == [[stream.uint64("a", 1), stream.uint64(9, 2), stream.uniform("b")]] * 2


def test_seed_name_request_and_counter_each_change_the_draw():
    base = RandomStream(1, "a").uint64(1, 1)
    others = [
        RandomStream(2, "a").uint64(1, 1),
        RandomStream(1, "b").uint64(1, 1),
        RandomStream(1, "a").uint64(2, 1),
        RandomStream(1, "a").uint64("1", 1),
        RandomStream(1, "a").uint64(1, 2),
        RandomStream(11, "a").uint64(1, 1),
        RandomStream(1, "1:a").uint64(1, 1),
    ]
    assert len({base, *others}) == 8


@pytest.mark.parametrize("axis", ["requests", "counters"])
def test_uniform_draws_are_uniform_along_requests_and_along_counters(axis):
    many = np.arange(50_000)
    stream = RandomStream(5, "uniformity")
    draws = stream.uniform_array(many) if axis == "requests" else stream.uniform_array("r", many)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    pairs = np.histogram2d(draws[:-1], draws[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


@settings(deadline=None)
@given(st.integers(1, 2**32), IDS, st.integers(0, 10))
def test_below_stays_under_its_bound(bound, request_id, counter):
    assert 0 <= RandomStream(3, "pick").below(bound, request_id, counter) < bound


def test_below_favours_no_value():
    stream = RandomStream(3, "pick")
    counts = np.bincount([stream.below(7, i) for i in range(14_000)], minlength=7)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_what_cannot_be_an_id_a_counter_or_a_bound_is_refused():
    stream = RandomStream(0, "x")
    with pytest.raises(ValueError, match=r"request id must be in .* got -1"):
        stream.uint64(-1)
    with pytest.raises(ValueError, match=r"counter must be in .* got 18446744073709551616"):
        stream.uint64(1, 2**64)
    with pytest.raises(ValueError, match=r"request id must be in .* got -4"):
        stream.uint64_array(np.array([3, -4]))
    with pytest.raises(ValueError, match="counter must be an integer"):
        stream.uint64_array(1, np.array([0.5]))
    with pytest.raises(ValueError, match="bound must be in"):
        stream.below(0, 1)
