"""docs/policies.md lists every policy as it is now."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from policies import registry
from policies.queues.fcfs import Fcfs
from tests.experiments.command import diptych


class PluggedIn(Fcfs):
    """Of another package."""


PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def test_the_page_lists_every_policy_as_the_command_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else: write what `diptych policies --markdown` prints below the page's head. Policies of other packages that are
    installed are not in it."""
    mine = EntryPoint("queue.plugged_in", f"{__name__}:PluggedIn", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [*entry_points(group=group), mine])
    assert "plugged_in" in registry.names("queue")
    status, out, _ = diptych(monkeypatch, capsys, "policies", "--markdown")
    assert status == 0
    page = PAGE.read_text()
    assert page.endswith(out)
    for role in registry.ROLES:
        for name in registry.names(role):
            ours = registry.find(role, name).__module__.startswith("policies.")
            assert (f"| `{name}` |" in out) == ours, name


@pytest.mark.parametrize("role", registry.ROLES)
def test_every_policy_says_in_one_line_what_it_does_and_where_it_is_from(role: str) -> None:
    for name in registry.names(role):
        doc = (registry.find(role, name).__doc__ or "").strip()
        first, *_ = doc.splitlines()
        assert first.endswith("."), name
        assert len(first) <= 120, name


@pytest.mark.parametrize(("typo", "meant"), [("mixd", "mixed"), ("vct", "vtc"), ("fewest_outputs", "fewest_output")])
def test_a_typo_suggests_the_nearest_name(
    typo: str, meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = diptych(monkeypatch, capsys, "policies", typo)
    assert status != 0
    assert f"did you mean '{meant}'" in err
