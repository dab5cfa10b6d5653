"""A validation from beginning to end: `diptych validate`, and `python -m benchmarks.gpu.fidelity` on a card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.fidelity.matrix import Cell, Sizes, Work, ordered, works
from experiments.spec import RunSpec, SpecError, check_spec

QUICK_CELLS = (
    *(Cell(work, load, "mixed") for work in ("chat", "prefix", "starved") for load in (None, 0.85)),
    Cell("chat", 0.85, "mixed", 1),
    Cell("chat", 0.85, "prefill_first"),
    Cell("chat", 0.85, "sjf"),
    Cell("starved", 0.85, "swap"),
)
"""One of everything."""


def base_spec(model: str, device: str, tensor_parallel: int = 1, **limits: Any) -> RunSpec:
    """Random weights of a model's shape, bfloat16 on a card; requests end after the lengths that they came with."""
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {
                "source": model,
                "load_format": "dummy",
                "dtype": dtype,
                "device": device,
                "tensor_parallel": tensor_parallel,
            },
            "limits": {"prefix_caching": False, **limits},
        }
    )


def quick(*, tensor_parallel: int = 1) -> tuple[RunSpec, dict[str, Work], tuple[Cell, ...]]:
    """A matrix for a CPU: a tiny model, and a tenth of the lengths."""
    base = base_spec(
        "tiny", "cpu", tensor_parallel, max_num_seqs=8, max_num_batched_tokens=128, max_model_len=256, num_blocks=160,
        num_host_blocks=80,
    )  # fmt: skip
    small = {
        name: Work(
            {**work.workload, "length_scale": 0.1 * work.workload.get("length_scale", 1.0)},
            work.limits,
            work.drawn_at,
            work.at_once,
            at_most=work.at_most,
            policies=work.policies,
        )
        for name, work in works(max_model_len=256, starved_blocks=40).items()
    }
    return base, small, QUICK_CELLS


def full(
    model: str, device: str, traces: Mapping[str, str], *, tensor_parallel: int = 1
) -> tuple[RunSpec, dict[str, Work], tuple[Cell, ...]]:
    """The whole matrix, for a card, or for several with one model. At 128 requests at once, not the usual 256, a
    replica that is full turns them over in seconds, so that runs of half a minute get past the start."""
    base = base_spec(model, device, tensor_parallel, max_num_seqs=128, max_model_len=4096, num_host_blocks=1000)
    found = works(max_model_len=4096, starved_blocks=1600, traces=traces)
    return base, found, tuple(ordered(found))


def trace_files(given: Iterable[str]) -> dict[str, str]:
    """Workload -> file, of texts WORKLOAD=FILE. Raises SpecError."""
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if not Path(path).is_file():
            raise SpecError(f"--trace {text}: write WORKLOAD=FILE, as chat=AzureLLMInferenceTrace_conv.csv")
        found[name] = path
    return found


def measure(
    base: RunSpec,
    works: Mapping[str, Work],
    cells: Iterable[Cell],
    folder: Path,
    sizes: Sizes,
    *,
    limit_s: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    kept: Callable[[], None] = lambda: None,
) -> int:
    """The real half: profile the device and run what the folder lacks, for `limit_s` at most. Returns how many cells
    were run. Raises SpecError for a folder of another matrix."""
    from experiments.fidelity.real_half import Clock, RealHalf  # torch is slow to import, and only needed here

    clock = Clock(limit_s)
    _same_matrix(folder, {"base": base.model_dump(mode="json"), "works": {n: asdict(w) for n, w in works.items()}})
    with RealHalf(base, works, folder, sizes, say, kept) as half:
        half.calibrate()
        return half.run(cells, clock)


def _same_matrix(folder: Path, matrix: dict[str, Any]) -> None:
    """Raise SpecError where a folder is of another matrix; else write it down there."""
    path = folder / "matrix.json"
    if path.exists() and not _alike(path, matrix):
        raise SpecError(f"{folder} has runs of another model or of other workloads; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(matrix, indent=1, sort_keys=True) + "\n")


def _alike(path: Path, matrix: dict[str, Any]) -> bool:
    """Whether a file is of the same matrix, with today's defaults for fields that it is older than."""
    try:
        before = _described(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError):  # what no such file holds
        return False
    return before == _described(matrix)


def _described(matrix: dict[str, Any]) -> dict[str, Any]:
    """Each workload as a run of its own, with everything that is not said."""
    base, found = matrix["base"], {}
    for name, fields in matrix["works"].items():
        work = Work(**fields)
        workload = {"n": 1, **work.workload}  # how many there are goes by capacity
        content = {**base, "workload": workload, "limits": {**base["limits"], **work.limits}}
        run = RunSpec.model_validate(content).model_dump(mode="json")
        found[name] = [run, asdict(replace(work, workload={}, limits={}))]
    return found
