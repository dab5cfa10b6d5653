"""How many of the branches that were measured are taken, by package: what the usual figure mixes with lines."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

LEAST = 95.0
"""Percent, of all branches together."""


def main(report: Path) -> int:
    """Print the figures of coverage's JSON report. Returns 1 where they are below `LEAST`."""
    branches: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for file, measured in json.loads(report.read_text())["files"].items():
        for name in (file.split("/")[0], "together"):
            branches[name] += measured["summary"]["num_branches"]
            taken[name] += measured["summary"]["covered_branches"]
    share = {name: 100 * taken[name] / max(1, branches[name]) for name in branches}
    for name, percent in sorted(share.items(), key=lambda item: item[0] == "together"):
        print(f"{name}: {taken[name]:,} of {branches[name]:,} branches are taken, {percent:.1f} %")
    if share["together"] < LEAST:
        print(f"fewer than {LEAST:.0f} %")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
