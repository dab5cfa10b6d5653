"""The command that a page shows gives the specification that it ran."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import Any

import pytest

from experiments.command_line import as_text, simulate_command
from experiments.spec import CostSpec, RunSpec, check_spec


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """What `diptych simulate` makes of it."""
    from experiments import cli
    from experiments.cli import running

    seen: list[RunSpec] = []
    monkeypatch.setattr(running, "_simulate", lambda spec, *rest: seen.append(spec))
    monkeypatch.setattr("sys.argv", words)
    with suppress(SystemExit):
        cli.main()
    return seen[0]


@pytest.mark.parametrize(
    "content",
    [
        {"workload": {"name": "chat", "n": 5}},
        {
            "workload": {"name": "code", "n": 7, "rate": 2.5, "seed": 3, "length_scale": 0.5},
            "seed": 3,
            "policies": {"scheduler": "sarathi,chunk_size=256", "queue": "sjf", "router": "power_of_two"},
            "limits": {"max_num_seqs": 16, "lag": 0},
            "cost": {"model": "qwen2.5-0.5b", "device": "l4", "dtype": "float16"},
            "replicas": 2,
            "decisions": False,
        },
        {"workload": {"name": "chat", "n": 5, "slo": {"ttft_ms": 100.0}, "tenants": {"a b": 1.0, "c": 2.0}}},
    ],
)
def test_the_command_gives_the_specification_again(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = check_spec({"target": "sim", **content})
    words = shlex.split(as_text(simulate_command(spec, "runs/x y")).replace("\\\n", " "))
    assert words[-2:] == ["-o", "runs/x y"]
    again = parsed(words, monkeypatch)
    assert again.model_copy(update={"cost": again.cost or CostSpec()}) == spec.model_copy(
        update={"cost": spec.cost or CostSpec()}
    )


def test_what_is_as_by_default_is_left_out() -> None:
    spec = check_spec({"target": "sim", "workload": {"name": "chat", "n": 5}, "cost": {"model": "llama-3.1-8b"}})
    assert simulate_command(spec) == ["diptych", "simulate", "--workload", "chat", "-n", "5"]
