"""The validation that is kept with the repository, repeated without a card."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import across_engines
from experiments.fidelity.sim_half import evaluate_cell
from experiments.fidelity.tables import markdown, relative_error
from experiments.refitting import refit
from experiments.spec import SpecError
from policies.shapes import StepShape
from simulator.costs import FittedCost

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity"
LARGE = RESULTS / "llama-3.1-8b"
CELL = "prefix~capacity~mixed~0"


def test_a_kept_run_decides_alike_again_and_is_simulated_as_the_tables_say() -> None:
    kept = json.loads((LARGE / "fidelity.json").read_text())["cells"][CELL]
    found = evaluate_cell(LARGE, CELL)
    assert found["decisions"] == {"identical": True, "steps": kept["decisions"]["steps"], "different": 0}
    for key, (real, simulated) in kept["figures"].items():
        assert found["figures"][key] == pytest.approx([real, simulated], rel=1e-6)
    for clock in ("device", "step"):
        assert found["steps"][clock]["all"] == pytest.approx(kept["steps"][clock]["all"], rel=1e-6)
    error = relative_error(found, "output_throughput")
    assert error is not None
    assert abs(error) < 0.01


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-0.6b"])
def test_the_page_has_the_tables_of_the_kept_validation(model: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text()
    assert markdown(json.loads((RESULTS / model / "fidelity.json").read_text())).strip() in page


def test_the_page_has_the_table_of_vllms_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text()
    kept = json.loads((RESULTS.parent / "across-engines.json").read_text())
    assert across_engines.markdown(kept) in page


def test_work_of_vllms_table_is_simulated_within_what_was_measured() -> None:
    model = "llama-3.1-8b"
    costs = FittedCost.load(min((RESULTS / model / "calibrations").glob("*.json")))
    engine = across_engines.Engine(costs, "prefill_first")
    (long, outside), (short, _) = (engine.seconds([(512, tokens)] * 8) for tokens in (129, 1))
    kept = json.loads((RESULTS.parent / "across-engines.json").read_text())[model]["simulated"]["decode_ms_b8"]
    assert (1e3 * (long - short) / 128, outside) == pytest.approx(kept)


def test_the_kept_calibration_is_what_its_profiled_steps_give() -> None:
    path = min((LARGE / "calibrations").glob("*.json"))
    kept, again = FittedCost.load(path), refit(path)
    assert kept.calibration.under_load is not None
    assert again.calibration.under_load is not None
    assert again.calibration.under_load.time_constant_ns == kept.calibration.under_load.time_constant_ns
    steps = pd.read_parquet(path.with_suffix(".parquet"))
    sizes = steps[[name for name in StepShape._fields if name in steps]]  # of before there were prices of look-ups
    for row in sizes[steps["padded_tokens"] > 0].iloc[::50].itertuples(index=False, name=None):
        shape = StepShape(*row)
        assert again.cost(shape) == pytest.approx(kept.cost(shape), rel=2e-3, abs=2_000)


def test_a_calibration_without_its_steps_cannot_be_fitted_anew(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text('{"provenance": {"seconds": 1}}')
    with pytest.raises(SpecError, match=r"card\.json cannot be fitted anew: .*; profile again") as error:
        refit(path)
    assert "\n" not in str(error.value)
