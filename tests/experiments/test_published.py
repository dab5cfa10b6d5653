"""Published results in their small form: their verdicts are those of docs/published.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.published.keeping import kept_study
from experiments.published.running import NAMES, as_markdown, run_study
from experiments.published.search import highest_rate
from experiments.published.study import FOLDER, Finding, Study, read_study
from experiments.published.vllm.buddy import BuddyOracle, BuddyPow2
from experiments.spec import SpecError
from policies.request import Request

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
DIFFERS = {
    "sarathi": {"By up to 2.6 times, with a 7B model on one A100"},  # capacities are found to 60 % only
    "vidur": {"Taking one trace's best for another costs up to twice as much"},  # among three configurations
    "mooncake": {  # the generator in place of the trace has 34 %
        "Of the hits that an endless cache has, one of 3 million tokens has a part (conversation trace, LRU)"
    },
}
"""Claims whose verdict is another one in the small form, by folder."""


def documented(study: Study) -> dict[str, bool]:
    """Claim -> whether it holds, as the page has it in full."""
    section = PAGE.read_text(encoding="utf-8").split(f"`{study.name}`\n", 1)[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!claim|---)(.+?) \| .+ \| (holds|\*\*does not hold\*\*) \|$", section, re.MULTILINE)
    return {claim: verdict == "holds" for claim, verdict in rows}


@pytest.mark.parametrize("name", NAMES)
def test_in_the_small_form_the_verdicts_are_those_of_the_page(name: str) -> None:
    study = run_study(name, reduced=True)
    found = {finding.claim: finding.holds for finding in study.findings}
    assert len(found) == len(study.findings) > 0
    page = documented(study)
    assert found.keys() == page.keys()
    assert {claim for claim in found if found[claim] != page[claim]} == DIFFERS.get(name, set())


def test_every_folder_is_run() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/spec.yaml")} == set(NAMES)


def test_a_name_or_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(SpecError, match="no published result 'vlm'"):
        run_study("vlm")
    study = read_study("vllm", reduced=True)
    with pytest.raises(SpecError, match=r"vllm/spec.yaml: workload.rates: unknown field"):
        study.spec({"workload": {"rates": 3}})


def test_the_small_form_changes_only_what_it_says() -> None:
    full, small = (read_study("vllm", reduced) for reduced in (False, True))
    assert small.run["workload"].pop("n") < full.run["workload"].pop("n")
    assert small.run == full.run
    assert small.values == full.values


def test_a_piece_of_a_buddy_allocator_is_the_next_power_of_two() -> None:
    request = Request(1, 0, 100, 2_000)
    assert BuddyOracle(16, oracle={1: 29}).most(request) == 256, "129 tokens"
    assert BuddyOracle(16, oracle={1: 28}).most(request) == 128, "128 tokens fit one exactly"
    assert BuddyPow2(16, oracle={1: 28}).most(request) == 256, "100 and 32"


def test_kept_findings_are_taken_while_the_sources_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, there = kept_study("agentix", True, tmp_path)
    again, there_again = kept_study("agentix", True, tmp_path)
    assert (there, there_again) == (False, True)
    assert again == made
    assert not kept_study("agentix", False, tmp_path)[1], "another form"
    monkeypatch.setenv("DIPTYCH_TRACES", "elsewhere")
    assert not kept_study("agentix", False, tmp_path)[1], "other traces"
    (tmp_path / "agentix.json").write_text("{")
    assert not kept_study("agentix", False, tmp_path)[1], "unreadable"
    assert [path.name for path in tmp_path.iterdir()] == ["agentix.json"]


def test_a_verdict_can_fail_and_is_shown() -> None:
    study = Study(
        "x", "X", "X et al.", ["a choice"], {}, {}, True, [Finding("a | b", "figure 1", "2", "1", "=", False)]
    )
    text = as_markdown([study])
    assert "| X | 1 | 0 | a | b (figure 1) |" in text
    assert "| a \\| b | figure 1 | 2 | 1 | = | **does not hold** |" in text


@pytest.mark.parametrize("limit", [1.0, 3.7, 42.0])
def test_the_highest_rate_is_found_and_far_overloads_are_not_asked_for(limit: float) -> None:
    asked: list[float] = []

    def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = highest_rate(holds, 0.5, 100.0, within=0.02)
    assert limit / 1.02 <= found <= limit
    assert max(asked) <= 1.6 * limit * 1.01
    assert highest_rate(lambda rate: False, 0.5, 9.0) == 0.5
    assert highest_rate(lambda rate: True, 0.5, 9.0) == 9.0
