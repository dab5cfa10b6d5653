"""`python -m dashboard FOLDER --port PORT`: what `diptych dashboard` runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dashboard.launch import launch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dashboard", description="The dashboard over a folder of runs.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=8501)
    arguments = parser.parse_args()
    raise SystemExit(launch(arguments.root, arguments.port))
