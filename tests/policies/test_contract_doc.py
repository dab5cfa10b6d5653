"""The contract's page says what is so: its example runs, and it leaves nothing of the contract out."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies import contract, enactment, registry
from policies.draft import Draft
from policies.plan import Plan, Report, Step
from policies.registry import PolicyError
from policies.replica_state import Limits
from policies.request import Request, Slo
from policies.stack import StackSpec
from tests.policies.decisions import decisions
from tests.policies.harness import Drive, Job

PAGE = (Path(__file__).parents[2] / "docs" / "contract.md").read_text()


@pytest.fixture(scope="module")
def gentle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's example, saved as the page says."""
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    folder = tmp_path_factory.mktemp("users")
    (folder / "gentle.py").write_text(example.group(1))
    sys.path.insert(0, str(folder))
    yield "gentle"
    sys.path.remove(str(folder))
    sys.modules.pop("gentle", None)


def stack(gentle: str, share: float = 0.25, ms_per_token: float = 1.0) -> StackSpec:
    return StackSpec(f"{gentle}:GentlePrefill,share={share}", f"{gentle}:AgedShortest,ms_per_token={ms_per_token}")


def test_the_example_imports_nothing_but_policies() -> None:
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    modules = [node.module for node in ast.walk(ast.parse(example.group(1))) if isinstance(node, ast.ImportFrom)]
    assert all(module in ("__future__",) or str(module).startswith("policies.") for module in modules)


JOBS = st.lists(st.builds(Job, st.integers(1, 60), st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=10)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JOBS, st.sampled_from([26, 40, 400]), st.sampled_from([0, 1]), st.booleans())
def test_the_example_serves_everybody_and_gives_each_decode_its_token(
    gentle: str, work: list[Job], num_blocks: int, lag: int, caching: bool
) -> None:
    limits = Limits(num_blocks, 4, 6, 24, 100, prefix_caching=caching, lag=lag)
    drive = Drive(limits, stack(gentle), work)
    assert all(request.state.value == "length" for request in drive.requests)
    for made, step in zip(decisions(drive), drive.steps, strict=True):
        if step.num_decodes:
            assert sum(tokens for _, _, tokens in made.chunks) <= 6


def test_the_examples_queue_prefers_short_jobs_until_the_long_one_has_aged(gentle: str) -> None:
    work = [Job(4, 4), Job(40, 40), *(Job(4, 4, arrives=i) for i in range(1, 40))]
    limits = Limits(200, 4, 1, 64, 100)
    for ms_per_token, first in ((0.0, 1), (1.0, 40)):
        drive = Drive(limits, stack(gentle, ms_per_token=ms_per_token), work)
        order = [i for made in decisions(drive) for i in made.admitted]
        assert order.index(1) == first


@pytest.mark.parametrize("knobs", ["share=0", "share=2", "share=nan"])
def test_the_example_refuses_knobs_that_make_no_sense(gentle: str, knobs: str) -> None:
    with pytest.raises(PolicyError, match="share must be"):
        StackSpec(f"{gentle}:GentlePrefill,{knobs}").build()


NAMES = {
    **{role: [n for n in vars(protocol) if not n.startswith("_")] for role, protocol in registry.ROLES.items()},
    "view": [n for n in vars(contract.View) if not n.startswith("_")],
    "plan": [f.name for f in fields(Plan)],
    "step": [f.name for f in fields(Step)],
    "report": [f.name for f in fields(Report)],
    "slo": [f.name for f in fields(Slo)],
    "request": [f.name for f in fields(Request) if not f.name.startswith("_")]
    + [n for n, v in vars(Request).items() if isinstance(v, property)],
    "draft": [n for n, v in vars(Draft).items() if callable(v) and not n.startswith("_")],
    "context": list(registry.CONTEXT),
}


@pytest.mark.parametrize("part", NAMES)
def test_the_page_names_everything_in_the_contract(part: str) -> None:
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", PAGE))))
    assert set(NAMES[part]) - words == set()


def test_the_page_names_every_reason_to_refuse() -> None:
    source = Path(enactment.__file__).read_text()
    reasons = set(
        re.findall(r"""_refuse\w*\(request, "([^"{]+)"\)|return "([^"]+)"|append\(\(request, "([^"]+)"\)\)""", source)
    )
    assert len(reasons) >= 12
    for reason in {next(filter(None, found)) for found in reasons} | {"token budget", "slots", "no blocks"}:
        assert f"`{reason}`" in PAGE, reason


def test_no_row_of_the_pages_tables_lacks_a_cell() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        rows = [line.count("|") for line in table.splitlines()]
        assert len(set(rows)) == 1, table.splitlines()[0]
