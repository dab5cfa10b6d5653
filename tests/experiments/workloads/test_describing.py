"""`diptych trace describe` against the statistics that the public traces' README prints, and small cases by hand."""

from __future__ import annotations

import io
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.workloads import TraceError, Workload
from experiments.workloads.describing import describe, describe_file, rows_of
from experiments.workloads.prefix_sharing import CAPACITIES, LruCurve, PrefixSharing

Find = Callable[[str], Path]
CONVERSATION = "mooncake/conversation_trace.jsonl.gz"
CLAUDE = "agents/claude_code_sessions_sample100.jsonl.gz"
MINISWE, MAGAGENT = "agents/miniswe_blk16.jsonl.gz", "agents/magagent_blk16.jsonl.gz"
RAGPULSE, ARENA = "ragpulse/0_trace.jsonl.gz", "multitenant/vtc_arena_real_trace.csv"
AZURE_CONV = "azure2023/AzureLLMInferenceTrace_conv.csv"
AZURE_CODE = "azure2023/AzureLLMInferenceTrace_code.csv"


@cache
def described(path: Path) -> dict[str, Any]:
    """Without a curve where the README has none: that of nine million blocks takes its time."""
    return describe_file(path, capacities=() if path.name in CLAUDE else CAPACITIES)


def agrees(value: float, printed: str) -> bool:
    """Is `printed` the value at the digits that it shows? Some were rounded to one digit more on the way."""
    digits = len(printed.partition(".")[2])
    return abs(round(value, digits + 1) - float(printed)) <= 0.5 * 10.0**-digits * (1 + 1e-6)


def table(trace: Find, heading: str) -> list[list[str]]:
    """The cells of the README's table whose header begins so."""
    lines = trace("README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("| ").split("|")])
    return rows


def test_every_row_of_the_readmes_table_of_traces_is_reproduced_to_the_printed_digits(trace: Find) -> None:
    rows = table(trace, "file | requests")
    assert len(rows) == 13
    for name, requests, span, rate, cv, idc, inputs, outputs in rows:
        found = described(trace(name.strip("`").split("`")[0].split(" (")[0]))
        assert found["requests"] == int(requests), name
        for which, printed in (("input", inputs), ("output", outputs)):
            for (statistic, value), text in zip(found["tokens"][which].items(), printed.split(" / "), strict=True):
                assert agrees(value, text), f"{name}: {statistic} of {which} is {value}, printed {text}"
        arrivals = found["arrivals"]
        if span == "-":
            assert arrivals is None, name
            continue
        number, unit = span.split()
        assert agrees(arrivals["span_s"] / {"s": 1, "d": 86_400}[unit], number), name
        assert agrees(arrivals["rate"], rate), name
        assert agrees(arrivals["cv"], cv), name
        for window, text in zip((1, 10, 60), idc.split(" / "), strict=True):
            assert agrees(arrivals[f"idc_{window}s"], text), f"{name}: IDC at {window} s"


def test_the_readmes_hit_rates_are_reproduced_to_the_printed_digits(trace: Find) -> None:
    rows = {cells[0].strip("`"): cells for cells in table(trace, "prefix / session data")}
    assert len(rows) == 5
    keys = ("hit_rate", "hit_rate_blocks", "hit_rate_mean_request")
    for name in ("mooncake/conversation_trace", CLAUDE[:-9], MINISWE[:-9], MAGAGENT[:-9]):
        found = described(trace(f"{name}.jsonl.gz"))["prefixes"]
        _, block, rates, notes = rows[name]
        assert found["block_tokens"] == int(block)
        printed = re.findall(r"0\.\d+", rates)
        if name == "mooncake/conversation_trace":
            wanted = dict(zip(keys, printed, strict=True))
        elif name == CLAUDE[:-9]:
            wanted = {"hit_rate": printed[0], "hit_rate_within_session": printed[0]}
        else:
            wanted = {"hit_rate": printed[0], "hit_rate_within_session": printed[1]}
        for key, text in wanted.items():
            assert agrees(found[key], text), f"{name}: {key} is {found[key]}, printed {text}"
        if "distinct" in notes:
            counts = [int(text.replace(",", "")) for text in re.findall(r"\d[\d,]+", notes)]
            assert [found["distinct_blocks"], found["block_references"]] == counts[:2], name
    chunks = described(trace(RAGPULSE))["chunks"]
    for key, text in zip(("prefix", "anywhere"), re.findall(r"0\.\d+", rows["ragpulse"][2]), strict=True):
        assert agrees(chunks[key], text), key


def test_the_readmes_lru_curves_are_reproduced_to_the_printed_digits(trace: Find) -> None:
    lines = trace("README.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| capacity (512-token blocks)"))
    capacities = [int(cell.replace(",", "")) for cell in re.findall(r"\d[\d,]*(?= \|)", header.split("blocks)")[1])]
    (curve,) = table(trace, "capacity (512-token blocks)")
    found = described(trace(CONVERSATION))["prefixes"]
    rates = [found["lru"][capacity] for capacity in capacities] + [found["hit_rate"]]
    for rate, text in zip(rates, curve[1:], strict=True):
        assert agrees(rate, text), f"{rate}, printed {text}"
    sentence = next(line for line in lines if line.startswith("With 16-token blocks"))
    for name, path in (("miniswe", MINISWE), ("magagent", MAGAGENT)):
        points = re.search(rf"{name} (0\.\d+) \(1,000\), (0\.\d+) \(5,000\)", sentence)
        assert points is not None
        lru = described(trace(path))["prefixes"]["lru"]
        assert agrees(lru[1_000], points[1])
        assert agrees(lru[5_000], points[2])


PROSE: list[tuple[str, str, str]] = [
    (AZURE_CONV, "arrivals.fewest_a_minute", "191"),
    (AZURE_CONV, "arrivals.most_a_minute", "507"),
    (AZURE_CONV, "tokens.rank_correlation", "0.07"),
    (AZURE_CODE, "arrivals.median_gap_s", "0.064"),
    (AZURE_CODE, "arrivals.largest_gap_s", "217"),
    (AZURE_CODE, "arrivals.fewest_a_minute", "0"),
    (AZURE_CODE, "arrivals.most_a_minute", "632"),
    (CONVERSATION, "arrivals.instants", "1180"),
    (CONVERSATION, "arrivals.mean_together", "10.2"),
    (CONVERSATION, "arrivals.most_together", "28"),
    (CONVERSATION, "prefixes.used_once", "0.76"),
    (RAGPULSE, "sessions.count", "3990"),
    (RAGPULSE, "sessions.turns.mean", "1.8"),
    (RAGPULSE, "sessions.turns.max", "25"),
    (RAGPULSE, "sessions.gap_s.p50", "40"),
    (RAGPULSE, "sessions.gap_s.p90", "300"),
    (RAGPULSE, "chunks.passages.count", "3235"),
    (RAGPULSE, "chunks.passages.uses", "33255"),
    (RAGPULSE, "chunks.passages.top_1_percent", "0.178"),
    (RAGPULSE, "chunks.passages.top_10_percent", "0.586"),
    (CLAUDE, "sessions.count", "100"),
    (CLAUDE, "sessions.turns.mean", "57"),
    (CLAUDE, "sessions.turns.p50", "28"),
    (CLAUDE, "sessions.turns.p90", "144"),
    (CLAUDE, "sessions.first_input.p50", "23923"),  # printed as 23.9 k
    (CLAUDE, "prefixes.new_tokens.mean", "4518"),
    (CLAUDE, "prefixes.new_tokens.p50", "752"),
    (CLAUDE, "prefixes.new_tokens.p90", "4954"),
    (CLAUDE, "sessions.think_s.mean", "140"),
    (CLAUDE, "sessions.think_s.p50", "9"),
    (CLAUDE, "sessions.think_s.p90", "176"),  # printed as 175
    (MINISWE, "sessions.count", "20"),
    (MAGAGENT, "sessions.count", "25"),
    (MAGAGENT, "not_servable", "53"),
    ("servegen/deepseek-r1_generated_1h.csv.gz", "arrivals.rate", "13.41"),
    ("servegen/deepseek-r1.tar.gz", "clients", "73"),
    ("servegen/deepseek-r1.tar.gz", "rate.mean", "16.0"),
    ("servegen/deepseek-r1.tar.gz", "rate.min", "4.3"),
    ("servegen/deepseek-r1.tar.gz", "rate.max", "42.5"),
    ("servegen/deepseek-r1.tar.gz", "cv", "2.28"),
    ("servegen/deepseek-r1.tar.gz", "top_shares.1", "0.29"),
    ("servegen/deepseek-r1.tar.gz", "top_shares.10", "0.68"),
    ("servegen/deepseek-r1.tar.gz", "fields.input_tokens", "1268 208 2092 23423 57284"),
    ("servegen/deepseek-r1.tar.gz", "fields.output_tokens", "1527 792 3432 12607 32768"),
    ("servegen/deepseek-r1.tar.gz", "fields.reason_ratio.mean", "0.70"),
    ("servegen/mm-image.tar.gz", "clients", "35"),
    ("servegen/mm-image.tar.gz", "rate.mean", "9.5"),
    ("servegen/mm-image.tar.gz", "rate.min", "4.9"),
    ("servegen/mm-image.tar.gz", "rate.max", "13.3"),
    ("servegen/mm-image.tar.gz", "cv", "2.21"),
    ("servegen/mm-image.tar.gz", "fields.text_tokens", "572 106 1914 3064 4242"),
    ("servegen/mm-image.tar.gz", "fields.image_tokens", "650 540 1224 1271 1280"),
    ("servegen/mm-image.tar.gz", "fields.image_count", "1.6 1 3 9 49"),
    ("servegen/mm-image.tar.gz", "fields.output_tokens", "130 100 264 587 2000"),
    ("servegen/m-large_day1.tar.gz", "clients", "162"),
    ("servegen/m-large_day1.tar.gz", "rate.mean", "279"),
    ("servegen/m-large_day1.tar.gz", "rate.min", "151"),
    ("servegen/m-large_day1.tar.gz", "rate.max", "583"),
    ("agents/miniswe_text.jsonl.gz", "counts.calls", "402"),
    ("agents/miniswe_text.jsonl.gz", "counts.sessions", "20"),
    ("agents/magagent_text.jsonl.gz", "counts.calls", "746"),
    ("agents/magagent_text.jsonl.gz", "counts.sessions", "25"),
    ("agents/magagent_text.jsonl.gz", "counts.empty inputs", "53"),
    ("prompts/prompts_200.jsonl", "counts.prompts", "200"),
    ("ragpulse/2_passages.jsonl.gz", "format", "chunk_lengths"),
    (ARENA, "tenants.count", "27"),
    (ARENA, "tenants.top_shares.1", "0.197"),
    (ARENA, "tenants.top_shares.4", "0.585"),
    ("lengths/sharegpt_v3_turns_cl100k.csv.gz", "sessions.count", "17396"),
    ("lengths/sharegpt_v3_turns_cl100k.csv.gz", "sessions.turns.mean", "3.5"),
    ("lengths/sharegpt_v3_turns_cl100k.csv.gz", "sessions.turns.p90", "7"),
]


def test_what_the_readme_says_of_single_files_is_reproduced_to_the_printed_digits(trace: Find) -> None:
    for name, key, printed in PROSE:
        value: Any = described(trace(name))
        for part in key.split("."):
            value = value[int(part) if part.isdigit() else part]
        if isinstance(value, str):
            assert value == printed
            continue
        values = list(value.values()) if isinstance(value, dict) else [value]
        for each, text in zip(values, printed.split(), strict=True):
            assert agrees(each, text), f"{name}: {key} is {value}, printed {printed}"


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name, text in files.items():
            member = tarfile.TarInfo(f"data/{name}")
            member.size = len(text)
            made.addfile(member, io.BytesIO(text.encode()))
    return path


def test_clients_are_weighted_with_their_requests_and_lengths_go_for_the_windows_up_to_the_next(tmp_path: Path) -> None:
    found = describe_file(
        archive(
            tmp_path / "clients.tar.gz",
            {
                "chunk-0-trace.csv": "0,1,2,Gamma,1,1\n600,3,4,,0,0\n1200,4,1,,0,0\n",
                "chunk-0-dataset.json": '{"0": {"n": "{10: 1.0}"}, "1200": {"n": "{20: 0.5, 30: 0.5}"}}',
                "chunk-1-trace.csv": "0,0,0,,0,0\n600,2,1,,0,0\n",
            },
        )
    )
    assert found["clients"] == 2
    assert found["rate"] == {"mean": 10 / 3, "min": 1.0, "max": 5.0}
    assert found["cv"] == (1 * 2 + 3 * 4 + 4 * 1 + 2 * 1) / 10
    assert found["top_shares"][1] == 0.8
    assert found["fields"]["n"] == {"mean": 17.5, "p50": 10.0, "p90": 30.0, "p99": 30.0, "max": 30.0}


def test_an_archive_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"other.tar.gz: has no chunk-N-trace.csv"):
        describe_file(archive(tmp_path / "other.tar.gz", {"readme.txt": "x"}))
    with pytest.raises(TraceError, match=r"bad.tar.gz: chunk-0-trace.csv: \['x'\] is no window's line"):
        describe_file(archive(tmp_path / "bad.tar.gz", {"chunk-0-trace.csv": "x\n"}))


# By hand


def test_what_a_trace_does_not_have_is_none() -> None:
    found = describe(rows_of(Workload.build([0, 0], [5, 5], [1, 2])))
    assert found["arrivals"] is found["tenants"] is found["sessions"] is found["prefixes"] is None
    assert found["tokens"]["rank_correlation"] is None


def test_sessions_are_counted_with_their_turns_and_gaps() -> None:
    times = [0, 1_000_000_000, 4_000_000_000, 5_000_000_000]
    found = describe(rows_of(Workload.build(times, [7, 9, 8, 6], [1, 1, 1, 1], session=[3, 5, 3, 3])))["sessions"]
    assert found["count"] == 2
    assert found["turns"]["mean"] == 2.0
    assert found["first_input"]["mean"] == 8.0
    assert (found["gap_s"]["p50"], found["gap_s"]["max"]) == (2.5, 4.0)


def test_prefixes_are_counted_in_tokens_blocks_requests_and_within_sessions() -> None:
    sharing = PrefixSharing(4, [2])
    for tokens, ids, session in ((12, (1, 2, 3), 0), (7, (1, 2), 1), (10, (1, 9, 3), 0)):
        sharing.add(tokens, ids, session)
    found = sharing.figures()
    assert found["hit_rate"] == 11 / 29  # nothing, 7 of 7, and 4 of 10
    assert found["hit_rate_blocks"] == 3 / 8
    assert found["hit_rate_mean_request"] == pytest.approx((0 + 1 + 4 / 10) / 3)
    assert found["hit_rate_within_session"] == 4 / 29
    assert found["used_once"] == 1 / 4
    assert found["lru"] == {2: 11 / 29}  # heads are the most recent: 1 and 2 stay, 3 goes


@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=9), max_size=30))
def test_all_sizes_of_cache_at_once_hit_what_each_hits_alone(requests: list[list[int]]) -> None:
    sizes = [1, 2, 3, 5, 8, 20]
    curve = LruCurve(sizes)
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in sizes]
    for ids in requests:
        alone = []
        for size, blocks in zip(sizes, caches, strict=True):
            alone.append(next((i for i, each in enumerate(ids) if each not in blocks), len(ids)))
            for each in reversed(ids):
                blocks[each] = None
                blocks.move_to_end(each)
            while len(blocks) > size:
                blocks.popitem(last=False)
        assert curve.serve(ids) == alone


def test_a_cache_of_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 block, not 0"):
        LruCurve([4, 0])
