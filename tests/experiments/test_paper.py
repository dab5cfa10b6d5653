"""`diptych plot`: figures of runs and sweeps, in the formats and at the widths of papers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.figure_rows import figures_of, gather, label_of
from experiments.paper import COLUMN, PAGE, cdf_figure, curve_figure, pareto_figure, save
from experiments.records import RunError
from experiments.simulated import run_simulated
from experiments.spec import check_spec
from tests.experiments.command import diptych


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two schedulers at two rates."""
    folder = tmp_path_factory.mktemp("runs")
    for scheduler in ("mixed", "prefill_first"):
        for rate in (20, 40):
            fields = {
                "workload": {"name": "multi-tenant", "n": 12, "rate": rate, "length_scale": 0.1},
                "policies": {"scheduler": scheduler},
                "cost": {"kind": "constant", "step_ms": 5},
                "limits": {"num_blocks": 200},
            }
            run_simulated(check_spec(fields), folder / f"{scheduler}-{rate}")
    return folder


def texts(figure: Figure) -> set[str]:
    axes = figure.axes
    labels = {axis.get_xlabel() for axis in axes} | {axis.get_ylabel() for axis in axes}
    return labels | {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def test_every_kind_of_figure_comes_from_the_command_with_units_and_in_every_format(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = str(runs / "mixed-20"), str(runs / "prefill_first-20")
    monkeypatch.chdir(tmp_path)
    for words in (
        f"cdf {one} {other} --metric ttft --width column -o cdf.svg -o cdf.pdf",
        f"timeline {one} -o timeline.png",
        f"curve {runs} --y median_ttft_ms --y p99_e2el_ms -o curve.svg",
        f"pareto {runs} -o pareto.svg",
        f"heat {runs} --x workload.rate --y policies.scheduler --of p99_e2el_ms -o heat.svg",
    ):
        status, _, error = diptych(monkeypatch, capsys, "plot", *words.split())
        assert status == 0, error
    assert (tmp_path / "cdf.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    for name in ("cdf", "curve", "pareto", "heat"):
        assert (tmp_path / f"{name}.svg").stat().st_size > 3_000
    width = re.search(r'width="([\d.]+)pt"', (tmp_path / "cdf.svg").read_text())
    assert width is not None
    assert float(width[1]) / 72 == pytest.approx(COLUMN, abs=0.01)


def test_a_curve_is_the_mean_over_seeds_in_a_band_from_the_smallest_to_the_largest() -> None:
    table = pd.DataFrame({"series": ["a"] * 4, "rate": [2.0, 2.0, 1.0, 1.0], "y": [4.0, 8.0, 1.0, 3.0]})
    figure = curve_figure(table, ("rate", "requests a second"), [("y", "TTFT p50 (ms)")])
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    assert line.get_ydata().tolist() == [2.0, 6.0]  # type: ignore[union-attr]
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].get_extents()
    assert (corners.ymin, corners.ymax) == (1.0, 8.0)
    assert texts(figure) == {"requests a second", "TTFT p50 (ms)", "a"}


def test_of_a_pareto_figure_those_are_joined_that_nobody_beats() -> None:
    table = pd.DataFrame({"policy": list("aabb"), "output_throughput": [1.0, 2, 3, 2], "p99_ttft_ms": [5.0, 4, 9, 6]})
    (line,) = pareto_figure(table, "output_throughput", "p99_ttft_ms").axes[0].get_lines()
    assert np.column_stack(line.get_data()).tolist() == [[2, 4], [3, 9]]


def test_a_distribution_says_its_unit_and_is_as_wide_as_a_page_with_several_panels() -> None:
    frame = pd.DataFrame({"completed": [True, True, False], "ttft_ms": [1.0, 3.0, 9.0], "e2e_ms": [4.0, 5.0, np.nan]})
    figure = cdf_figure({"one": frame}, ["ttft_ms", "e2e_ms"])
    assert texts(figure) == {"TTFT (ms)", "E2E (ms)", "share of requests", "", "one"}
    assert figure.get_size_inches()[0] == PAGE
    assert figure.axes[0].get_lines()[0].get_xdata().max() == 3.0  # type: ignore[union-attr]


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"completed": [True], "ttft_ms": [1.0]})
    for name in ("a.pdf", "b.pdf"):
        save(cdf_figure({"one": frame}), tmp_path / name, COLUMN)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_a_sweeps_table_gives_its_cells_what_was_varied_and_their_figures(tmp_path: Path) -> None:
    pd.DataFrame(
        {
            "cell": ["c0", "c1", "c2"],
            "policies.scheduler": ["mixed", "sarathi,chunk_size=64", "mixed"],
            "workload.rate": [1.0, 2.0, 3.0],
            "seed": [0, 0, 0],
            "panel": ["sim"] * 3,
            "status": ["ok", "ok", "failed"],
            "error": [None, None, "no"],
            "p99_ttft_ms": [5.0, 6.0, np.nan],
            "key": ["x", "y", "z"],
        }
    ).to_parquet(tmp_path / "results.parquet")
    rows = gather([tmp_path])
    assert [row["policy"] for row in rows] == ["mixed", "sarathi,chunk_size=64"]
    assert rows[1]["knobs"] == {"policies.scheduler": "sarathi,chunk_size=64", "workload.rate": 2.0, "seed": 0.0}
    assert [row["p99_ttft_ms"] for row in rows] == [5.0, 6.0]
    assert figures_of(rows)[0] == "p99_ttft_ms"
    assert label_of("p99_ttft_ms") == "TTFT p99 (ms)"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("cdf RUNS/mixed-20 -o figure.bmp", "ends in .pdf, .svg, .png"),
        ("cdf RUNS/mixed-20 --metric tbt -o x.pdf", "--metric tbt: there is none; give one of ttft, tpot, e2e"),
        ("cdf RUNS/mixed-20 --width wide -o x.pdf", "--width wide: give column, page"),
        ("curve RUNS/mixed-20 --x workload.rat -o x.pdf", "--x workload.rat: no run has such a number; there are"),
        ("curve RUNS/mixed-20 --y p98 -o x.pdf", "no run has the figure 'p98'; there are output_throughput"),
        ("pareto RUNS --x speed -o x.pdf", "--x speed: there is none"),
        ("heat RUNS/mixed-20 --x a --y b -o x.pdf", "no run has both a and b"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    words: str, says: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = diptych(monkeypatch, capsys, "plot", *words.replace("RUNS", str(runs)).split())
    assert status == 2
    assert says in error
    assert error.count("\n") == 1


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run, no folder of runs and no sweep"):
        gather([tmp_path])
