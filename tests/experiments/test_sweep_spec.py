"""A sweep's file: which cells it makes, and where it says that something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.spec import SpecError
from experiments.sweeps import read_sweep
from experiments.sweeps.cells import put

BASE: dict[str, Any] = {
    "workload": {"name": "fixed", "n": 20, "rate": 20, "prompt_tokens": 20, "output_tokens": 5},
    "cost": {"kind": "constant", "step_ms": 10},
    "limits": {"num_blocks": 500, "max_num_seqs": 4},
}


def made(**fields: Any) -> list[Any]:
    return read_sweep({"base": BASE, **fields}).cells


def test_grids_are_crossed_zips_go_together_and_seeds_come_last() -> None:
    cells = made(
        variables={
            "grid": {"workload.rate": [1, 2]},
            "zip": {"limits.max_num_seqs": [1, 8], "policies.scheduler": ["mixed", "sarathi"]},
            "seeds": 2,
        }
    )
    found = [(c.spec.workload.rate, c.spec.limits.max_num_seqs, c.spec.policies.scheduler, c.spec.seed) for c in cells]
    pairs = [(1, "mixed"), (8, "sarathi")]
    assert found == [(rate, *pair, seed) for rate in (1.0, 2.0) for pair in pairs for seed in (0, 1)]
    assert [c.spec.workload.seed for c in cells] == [0, 1] * 4
    assert len({c.key for c in cells}) == len({c.name for c in cells}) == 8


def test_a_knob_of_a_policy_is_a_field_below_its_role_whatever_the_order() -> None:
    zipped = {"policies.scheduler.chunk_size": [64, 128], "policies.scheduler": ["sarathi", "sarathi"]}
    assert [c.spec.policies.scheduler for c in made(variables={"zip": zipped})] == [
        "sarathi,chunk_size=64",
        "sarathi,chunk_size=128",
    ]
    content: dict[str, Any] = {"policies": {"scheduler": "sarathi,chunk_size=9"}}
    put(content, "policies.scheduler.chunk_size", 10)
    assert content["policies"]["scheduler"] == {"name": "sarathi", "chunk_size": 10}


def test_both_panels_make_two_cells_and_the_simulation_follows_the_real_one() -> None:
    real, sim = made(panel="both")
    assert (real.panel, sim.panel, sim.like) == ("real", "sim", real.name)
    assert real.spec.model_dump(exclude={"target"}) == sim.spec.model_dump(exclude={"target"})
    assert real.key != sim.key != made(panel="sim")[0].key


def test_the_panel_is_the_bases_where_the_sweep_names_none() -> None:
    assert [c.panel for c in made()] == ["sim"]
    assert [c.panel for c in read_sweep({"base": {**BASE, "target": "both"}}).cells] == ["real", "sim"]


def test_a_key_is_of_what_runs_and_not_of_what_it_is_called(tmp_path: Path) -> None:
    (one,) = made(variables={"grid": {"workload.rate": [20]}})
    (same,) = made(variables={"grid": {"workload.rate": [20.0]}})
    (other,) = made(variables={"grid": {"workload.rate": [21]}})
    assert one.key == same.key == made()[0].key != other.key
    trace = tmp_path / "trace.csv"
    keys = []
    for text in ("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,5\n", "x\n"):
        trace.write_text(text)
        keys.append(read_sweep({"base": {**BASE, "workload": {"name": str(trace)}}}).cells[0].key)
    assert keys[0] != keys[1]


FILE = """\
base:
  workload:
    name: fixed
    n: 20
    duration_s: 90
  cost: {kind: constant, step_ms: 10}
  limits: {num_blocks: 500}
variables:
  grid:
    policies.scheduler:
      - mixed
      - sarathi
    workload.rate: [1, 2]
  zip:
    seed: [1, 2]
    limits.max_num_seqs: [4, 8]
"""


def assert_refused(content: str, where: int | None, what: str) -> None:
    """A file in the current folder: the error is one line, and names the line of the file if there is one."""
    Path("sweep.yaml").write_text(content)
    with pytest.raises(SpecError) as caught:
        read_sweep("sweep.yaml")
    text = str(caught.value)
    assert text.startswith(f"sweep.yaml:{where}: " if where else "sweep.yaml ")
    assert what in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("before", "after", "where", "what"),
    [
        ("duration_s: 90", "duration_s: long", "5", "workload.duration_s: Input should be a valid number"),
        ("    n: 20", "    num: 20", "4", "workload.num: unknown field; known: name"),
        ("      - sarathi", "      - sarati", "12", "policies.scheduler: there is no scheduler 'sarati'; did you mean"),
        ("[1, 2]\n  zip", "[1, -2]\n  zip", "13", "workload.rate: Input should be greater"),
        ("    workload.rate: [1", "    workload.rat: [1", "13", "workload.rat: unknown field; did you mean 'rate'"),
        ("    workload.rate: [1", "    policies.scheduler.chunk: [1", "13", "mixed has no such knob"),
        ("    workload.rate: [1", "    workload.name.more: [1", "13", "workload.name is no group of fields"),
        ("limits.max_num_seqs: [4, 8]", "limits.max_num_seqs: [4, true]", "16", "limits.max_num_seqs: Input should be"),
        ("[4, 8]", "[4]", "8", "as many values each; seed has 2, limits.max_num_seqs has 1"),
        ("    seed: [1, 2]\n", "    workload.rate: [1, 2]\n", "8", "workload.rate is varied twice"),
        ("[1, 2]\n  zip", "[1, 1]\n  zip", "8", "workload.rate has the value 1 twice"),
        ("variables:", "variable:", "8", "variable: unknown field; did you mean 'variables'"),
        ("  zip:", "  zap:", "14", "variables.zap: unknown field; did you mean 'zip'"),
        ("    n: 20", "    n: 20\n    n: 21", "5", "base.workload.n stands here a second time"),
        ("variables:", "compare: policies.queue\nvariables:", "1", "policies.queue is not varied"),
        ("variables:", "window: {skip_first: 2}\nvariables:", "8", "window.skip_first: Input should be less than 1"),
        ("variables:", "slo: {itl: 2}\nvariables:", "8", "slo: there is no objective 'itl'"),
        ("variables:", "panel: reel\nvariables:", "8", "panel: Input should be 'real', 'sim' or 'both', not 'reel'"),
        ("variables:", "variables: [", "", "is not valid YAML"),
    ],
)
def test_an_error_names_the_line_and_the_field(
    before: str, after: str, where: int | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(FILE.replace(before, after, 1), where, what)


POOLS = """\
base:
  workload: {name: fixed, n: 5, rate: 2}
  policies: {queue: sjf}
  pools:
    - {name: fast, cost: {device: a100-sxm-80gb}}
    - {name: slow, policies: {scheduler: "sarathi,chunk_size=64"}}
variables:
  grid:
    pools.0.replicas: [1, 2]
    pools.1.policies.scheduler.chunk_size: [128, 256]
"""


def test_a_field_of_one_pool_can_be_varied(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(POOLS)
    cells = read_sweep(tmp_path / "sweep.yaml").cells
    assert [
        ([pool.replicas for pool in cell.spec.pools], [cell.spec.of_pool(i).policies.scheduler for i in range(2)])
        for cell in cells
    ] == [([replicas, 1], ["mixed", f"sarathi,chunk_size={chunk}"]) for replicas in (1, 2) for chunk in (128, 256)]
    assert len({cell.key for cell in cells}) == 4
    assert all(cell.spec.of_pool(1).policies.queue == "sjf" for cell in cells)


@pytest.mark.parametrize(
    ("before", "after", "where", "what"),
    [
        (
            "pools.0.rep",
            "pools.2.rep",
            9,
            "pools.2.replicas: there is no entry '2' in a list of 2; give its place: 0, 1",
        ),
        ("pools.0.rep", "pools.fast.rep", 9, "pools.fast.replicas: there is no entry 'fast' in a list of 2"),
        ("pools.0.rep", "pools.-1.rep", 9, "pools.-1.replicas: there is no entry '-1' in a list of 2"),
        ("[1, 2]", "[1, 0]", 9, "pools.0.replicas: Input should be greater than or equal to 1, not 0"),
        ("pools.0.replicas", "pools.0.replica", 9, "pools.0.replica: unknown field; did you mean 'replicas'"),
        ("pools.1.policies.scheduler.chunk_size", "pools.1.policies.scheduler.chunks", 10, "sarathi has no such knob"),
        ("  pools:", "  tools:", 9, "pools.0.replicas: there is no entry '0' in a list of 0; give the run some first"),
        ("pools.1.p", "pools.0.p", 10, "pools.0.policies.scheduler.chunk_size: mixed has no such knob"),
    ],
)
def test_an_error_in_a_pool_names_the_line_and_the_field(
    before: str, after: str, where: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(POOLS.replace(before, after, 1), where, what)


def test_the_base_may_be_the_file_of_a_run_beside_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("workload: {name: fixed, n: 5, rate: 2}\nlimits: {num_blocks: 0}\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("base: run.yaml\nvariables: {seeds: 2}\n")
    with pytest.raises(SpecError, match=r"run.yaml:2: limits.num_blocks: Input should be greater"):
        read_sweep(sweep)
    (tmp_path / "run.yaml").write_text("workload: {name: fixed, n: 5, rate: 2}\n")
    assert len(read_sweep(sweep).cells) == 2
    sweep.write_text("base: ran.yaml\n")
    with pytest.raises(SpecError, match=r"sweep.yaml:1: base: there is no file"):
        read_sweep(sweep)


def test_a_dictionary_is_checked_as_a_file_is() -> None:
    with pytest.raises(SpecError, match=r"the sweep: workload\.rate: Input should be greater"):
        made(variables={"grid": {"workload.rate": [-1]}})
