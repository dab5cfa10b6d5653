"""docs/policies.md lists every policy as it is now."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies import registry
from tests.experiments.command import diptych

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def test_the_page_lists_every_policy_as_the_command_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else: write what `diptych policies --markdown` prints below the page's head."""
    status, out, _ = diptych(monkeypatch, capsys, "policies", "--markdown")
    assert status == 0
    page = PAGE.read_text()
    assert page.endswith(out)
    for role in registry.ROLES:
        for name in registry.names(role):
            assert f"| `{name}` |" in out


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
