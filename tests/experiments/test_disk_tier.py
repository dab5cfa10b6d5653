"""The disk tier from a specification to a run's records, figures and replay, in both panels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.metrics import summarize
from experiments.real import load, prepare, real_limits, run_real
from experiments.records import read_run
from experiments.simulated import make_costs, run_simulated, simulated_limits
from experiments.spec import CostSpec, SpecError
from experiments.timeline import states
from experiments.workloads import Workload
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.serving.commands import Hosted
from tests.experiments.command import diptych
from tests.experiments.replayed import check_replay
from tests.experiments.test_host_memory import CONSTANT, spec

LIMITS = {"num_blocks": 18, "max_model_len": 150, "num_host_blocks": 12, "num_disk_blocks": 60}


def test_runs_with_prefixes_on_disk_replay_and_say_what_was_moved_in_both_panels(tmp_path: Path) -> None:
    """Six prompts again and again, more than the device and the host have room for together."""
    shared = [tuple(range(100 * (i % 6), 100 * (i % 6) + 6)) for i in range(30)]
    output = [3 + i % 5 for i in range(30)]
    workload = Workload(
        [20_000_000 * (i // 2) for i in range(30)], [96 + i % 9 for i in range(30)], output, output, hash_ids=shared,
        hash_block=16,
    )  # fmt: skip
    folder = {"disk_folder": str(tmp_path / "blocks"), "disk_block_us": 100}
    given = spec(policies={"offload": "write_back,fetch=always"}, cost=CONSTANT, limits={**LIMITS, **folder})
    run_real(given, tmp_path / "real", workload=workload, check=True)
    run_simulated(given, tmp_path / "sim", workload=workload, check=True)
    for name in ("real", "sim"):
        run = read_run(tmp_path / name)
        check_replay(run, tmp_path / f"{name}-replay")
        figures, steps = summarize(run), run.steps
        assert figures["disk_blocks_out"] == steps["disk_out"].sum() // 16 > 0
        assert figures["disk_blocks_in"] == steps["disk_in"].sum() // 16 > 0
        assert figures["disk_blocks_lost"] == steps["disk_dropped"].sum()
        assert figures["disk_token_share"] == run.requests["disk_tokens"].sum() / workload.prompt_tokens.sum() > 0
        assert (run.requests["disk_tokens"] <= run.requests["fetched_tokens"]).all()
        assert states(run)["disk_share"].max() == pytest.approx(100 * steps["disk_blocks"].max() / 60)
        told = run.decisions[run.decisions["kind"] == "disk"]
        assert (told["reason"] == "").all()
        assert len(told) == figures["disk_blocks_out"] + figures["disk_blocks_in"]
    assert not list((tmp_path / "blocks").glob("*/block-*"))


def test_a_disk_is_given_in_blocks_or_in_gibibytes_with_a_speed_that_is_known_somewhere(tmp_path: Path) -> None:
    offload = {"offload": "write_back"}
    gib = spec(limits={"disk_gib": 0.5, "disk_folder": str(tmp_path)}, policies=offload)
    loaded, roofline = load(gib.model), make_costs(CostSpec())
    limits = real_limits(gib, loaded)
    assert limits.num_disk_blocks == 2**29 // 8192
    assert 0 < limits.disk_read_ns < 10**9  # tried out
    assert 0 < limits.disk_write_ns < 10**9
    simulated = simulated_limits(gib, roofline)  # 2 MiB a block, by the device's data sheet
    assert (simulated.num_disk_blocks, simulated.disk_read_ns) == (256, round(2**21 / 6.9))
    slow = spec(limits={"num_disk_blocks": 9, "disk_gb_s": 1}, policies=offload)
    assert simulated_limits(slow, roofline).disk_write_ns == 2**21
    with pytest.raises(SpecError, match="say where blocks are to lie, with --disk-folder"):
        real_limits(slow, loaded)
    with pytest.raises(SpecError, match=r"how long a block takes on disk is not known; give limits\.disk_block_us"):
        simulated_limits(slow, make_costs(CostSpec(**CONSTANT)))
    with pytest.raises(SpecError, match="give num_disk_blocks or disk_gib, not both"):
        spec(limits={"num_disk_blocks": 1, "disk_gib": 1})
    with pytest.raises(SpecError, match="name one, as --offload write_back"):
        simulated_limits(spec(limits={"num_disk_blocks": 9}), roofline)
    with pytest.raises(SpecError, match="blocks get to disk by host memory; give some with --host-memory"):
        simulated_limits(spec(limits={"num_disk_blocks": 9, "num_host_blocks": None}, policies=offload), roofline)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SpecError, match=r"cannot be used .*; give another folder"):
        real_limits(spec(limits={"num_disk_blocks": 9, "disk_folder": str(file)}, policies=offload), loaded)


def test_an_offload_policy_where_no_prefixes_are_cached_is_refused_in_both_panels() -> None:
    given = spec(policies={"offload": "write_through"}, limits={"prefix_caching": False})
    message = r"write_through keeps prefixes, and limits\.prefix_caching is off; leave out one"
    with pytest.raises(SpecError, match=message):
        simulated_limits(given, make_costs(CostSpec()))
    with pytest.raises(SpecError, match=message):
        prepare(given, load(given.model))


@pytest.mark.parametrize("limits", [Limits(9), Limits(9, num_host_blocks=4, prefix_caching=False)])
def test_an_engine_without_room_for_prefixes_refuses_an_offload_policy_while_it_serves(limits: Limits) -> None:
    hosted = Hosted(None, SimpleNamespace(limits=limits), StackSpec())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offload: write_back keeps prefixes in host memory, and this engine has none"):
        hosted._change_policies(None, 0, {"offload": "write_back"})  # type: ignore[arg-type]


def test_the_command_line_takes_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "-w sessions -n 8 --rate 50 --host-memory 1 --disk 2 --offload write_through --out run"
    assert diptych(monkeypatch, capsys, "simulate", *flags.split())[0] == 0
    run = read_run(tmp_path / "run")
    assert run.limits["num_disk_blocks"] == 1024
    assert run.steps["disk_out"].sum() > 0
