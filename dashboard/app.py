"""The dashboard's entry: `streamlit run app.py -- FOLDER`. It reads the runs in the folder.

The folder is the argument, else what DIPTYCH_RUNS names, else `runs`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dashboard import pages


def chosen_root() -> Path:
    """The folder of runs."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_RUNS", "runs"))


pages.show(chosen_root())
