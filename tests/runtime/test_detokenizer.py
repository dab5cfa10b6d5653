"""Text by deltas is the text of the whole, however the bytes fall into tokens and the tokens into pushes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.detokenizer import IncrementalDetokenizer
from runtime.sampling.params import SamplingParams

SPECIAL = 1_000_000
TEXTS = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda s: s.encode("utf-8")),
    st.text(alphabet="ab€", max_size=30).map(lambda s: s.encode()),
    st.lists(st.sampled_from([b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"a", b"\xff"]), max_size=15).map(
        b"".join
    ),
)
STOPS = st.lists(st.text(alphabet="ab€\ufffd", min_size=1, max_size=4), max_size=3).map(tuple)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def run(pieces: list[bytes], params: SamplingParams, group: int = 1) -> tuple[list[str], IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(pieces.__getitem__, (), params)
    ids = list(range(len(pieces)))
    deltas = [detokenizer.push(ids[i : i + group]) for i in range(0, len(ids), group)]
    return [*deltas, detokenizer.flush()], detokenizer


def one_shot(text: str, stops: tuple[str, ...], after: int, include: bool) -> tuple[str, str | None]:
    """The definition: the first place over `after` where a stop string ends, and the longest that does."""
    for end in range(after + 1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 100), max_size=12), st.integers(1, 4))
def test_any_split_of_any_bytes_decodes_as_the_whole(data, cuts, group):
    deltas, _ = run(split(data, cuts), SamplingParams(), group)
    assert "".join(deltas) == data.decode("utf-8", errors="replace")


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 100), max_size=12), STOPS, st.booleans(), st.integers(1, 4))
def test_any_split_stops_where_the_whole_would(data, cuts, stops, include, group):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    deltas, detokenizer = run(split(data, cuts), params, group)
    expected, stop = one_shot(data.decode("utf-8", errors="replace"), stops, 0, include)
    assert "".join(deltas) == expected
    assert detokenizer.finished_by == stop


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=4), max_size=10), STOPS, st.booleans(), st.integers(0, 8))
def test_a_stop_string_that_ends_within_min_tokens_does_not_count(pieces, stops, include, minimum):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=minimum, max_tokens=None)
    deltas, detokenizer = run([p.encode() for p in pieces], params)
    expected, stop = one_shot("".join(pieces), stops, len("".join(pieces[:minimum])), include)
    assert "".join(deltas) == expected
    assert detokenizer.finished_by == stop


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 100), max_size=12), STOPS)
def test_no_delta_is_ever_taken_back(data, cuts, stops):
    pieces = split(data, cuts)
    deltas, _ = run(pieces, SamplingParams(stop=stops))
    emitted = ""
    for i, delta in enumerate(deltas[:-1]):
        emitted += delta
        # Whatever comes next, also the worst: each stop string whole, and nothing at all.
        for rest in [b"", *(s.encode() for s in stops)]:
            whole = b"".join(pieces[: i + 1]) + rest
            text, _ = one_shot(whole.decode("utf-8", errors="replace"), stops, 0, False)
            assert text.startswith(emitted)


def test_part_of_a_character_is_held_until_it_is_whole():
    deltas, _ = run([b"a\xe2", b"\x82", b"\xac", b"b"], SamplingParams())
    assert deltas == ["a", "", "€", "b", ""]


def test_an_unfinished_character_becomes_one_replacement_at_the_end():
    deltas, _ = run([b"a", b"\xf0\x9f\x98"], SamplingParams())
    assert deltas == ["a", "", "\ufffd"]


def test_what_may_begin_a_stop_string_is_held_and_let_go_when_it_does_not():
    deltas, detokenizer = run([b"x<", b"/s", b"]", b"<", b"/s>", b"y"], SamplingParams(stop=("</s>",)))
    assert deltas == ["x", "", "</s]", "", "", "", ""]
    assert detokenizer.finished_by == "</s>"
    assert detokenizer.num_tokens == 5


def test_text_without_the_beginning_of_a_stop_string_is_not_delayed():
    deltas, _ = run([b"one ", b"two ", b"three"], SamplingParams(stop=("STOP",)))
    assert deltas == ["one ", "two ", "three", ""]


def test_a_stop_string_inside_one_token_cuts_the_token():
    deltas, detokenizer = run([b"yes. STOP and more"], SamplingParams(stop=("STOP",)))
    assert "".join(deltas) == "yes. "
    assert detokenizer.finished_by == "STOP"


def test_the_stop_string_that_ends_first_wins_over_its_place_in_the_list():
    deltas, detokenizer = run([b"ab12cd"], SamplingParams(stop=("cd", "b1")))
    assert "".join(deltas) == "a"
    assert detokenizer.finished_by == "b1"


def test_special_tokens_are_left_out_or_kept_as_asked():
    def id_to_bytes(token: int) -> bytes:
        return b"<eos>" if token == SPECIAL else bytes([token])

    for skip, text in ((True, "€"), (False, "\ufffd<eos>\ufffd\ufffd")):
        params = SamplingParams(skip_special_tokens=skip)
        detokenizer = IncrementalDetokenizer(id_to_bytes, {SPECIAL}, params)
        assert detokenizer.push([0xE2, SPECIAL, 0x82, 0xAC]) + detokenizer.flush() == text


def test_tokens_after_a_stop_string_are_ignored_and_after_flush_refused():
    detokenizer = IncrementalDetokenizer(lambda t: bytes([t]), (), SamplingParams(stop=("b",)))
    assert detokenizer.push(b"abc") == "a"
    assert detokenizer.push(b"d") == ""
    assert detokenizer.flush() == ""
    with pytest.raises(RuntimeError, match="after flush"):
        detokenizer.push(b"e")
