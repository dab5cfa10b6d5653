"""The tests that a CUDA card changes: `python -m benchmarks.gpu.run_tests`, needing pytest and no installation.

First those marked `gpu`, from the files that have such a mark, so that the others' packages need not be there; then
all tests of the kernels, which run on the card where there is one. JUnit reports and a summary in JSON go into the
folder named by DIPTYCH_BENCH_OUT (else benchmarks/results).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.gpu.results import ROOT, out_folder, revision

KERNELS = Path("tests/runtime/kernels")
COUNTS = ("tests", "failures", "errors", "skipped")


def marked_files() -> list[str]:
    """Test files outside the kernels' folder with a test that needs a card."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [str(f) for f in files if KERNELS not in f.parents and "mark.gpu" in (ROOT / f).read_text()]


def run(name: str, arguments: list[str], folder: Path) -> dict[str, object]:
    """One run of pytest; its counts, its exit status, and the names of the tests that failed."""
    report = folder / f"gpu-tests-{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]  # most of the time goes into compiling kernels
    command += arguments
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return {"status": status, **(counts(report) if report.exists() else {})}


def counts(report: Path) -> dict[str, object]:
    """From a JUnit report."""
    root = ET.parse(report).getroot()
    suites = [root] if root.tag == "testsuite" else list(root)
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**{key: sum(int(suite.get(key, 0)) for suite in suites) for key in COUNTS}, "failed": failed}


def main() -> None:
    import torch

    folder = out_folder().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"marked": run("marked", ["-m", "gpu", *marked_files()], folder)}
    if any((ROOT / KERNELS).glob("test_*.py")):
        runs["kernels"] = run("kernels", [str(KERNELS)], folder)
    cuda = torch.cuda.is_available()
    summary = {
        "device": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "revision": revision(),
        "runs": runs,
    }
    (folder / "gpu-tests.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(0 if all(one["status"] == 0 for one in runs.values()) else 1)


if __name__ == "__main__":
    main()
