"""Whatever evicts, a real run and its replay evict alike; who needs the future is refused where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.real import load, run_real
from experiments.records import read_run
from experiments.spec import check_spec
from policies import registry
from policies.registry import PolicyError
from runtime.weights import LoadedModel
from tests.experiments.test_replay import _assert_replays, _spec, _workload


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load(check_spec(_spec("mixed", 0, True)).model)


def _evicting(name: str) -> dict[str, object]:
    spec = _spec("mixed", 1, True)
    return spec | {"policies": {"scheduler": "mixed", "eviction": name}}


@pytest.mark.parametrize("name", [name for name in registry.names("eviction") if name not in ("lru", "belady")])
def test_a_real_run_replays_without_a_divergence(name: str, tiny: LoadedModel, tmp_path: Path) -> None:
    run_real(check_spec(_evicting(name)), tmp_path / "real", workload=_workload(7), loaded=tiny, check=True)
    assert read_run(tmp_path / "real").requests["cached_tokens"].sum() > 0
    _assert_replays(tmp_path / "real")


def test_a_real_run_knows_no_future(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="only a simulation knows them"):
        run_real(check_spec(_evicting("belady")), tmp_path / "real", workload=_workload(7), loaded=tiny)
