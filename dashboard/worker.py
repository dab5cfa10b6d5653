"""`python -m dashboard.worker SPEC FOLDER`: simulate in a process of its own, so that the pages stay quick.

Says how far it is, as lines `ENDED TOTAL` on stdout; ends where its input is closed, as then the dashboard is gone.
Killed, it leaves a readable, incomplete record. An error is one line on stderr.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from experiments.cli.failures import INTERRUPTED, one_line
from experiments.simulated import run_simulated
from experiments.spec import read_spec
from experiments.workloads import make_workload


def main() -> int:
    """Exit status: 0, 1 after an error, 130 after an interrupt."""
    spec, folder = read_spec(Path(sys.argv[1])), Path(sys.argv[2])
    threading.Thread(target=_end_with_the_dashboard, daemon=True).start()
    try:
        workload = make_workload(spec.workload)
        total, every, ended = len(workload), max(1, len(workload) // 200), 0

        def on_end(request: object) -> None:
            nonlocal ended
            ended += 1
            if ended % every == 0 or ended == total:
                print(ended, total, flush=True)

        print(0, total, flush=True)
        run_simulated(spec, folder, workload=workload, on_end=on_end, flush_seconds=0.7)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


def _end_with_the_dashboard() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock this thread would keep at exit; nobody writes, so it returns at the end
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
