"""The dashboard's entry: `streamlit run app.py -- FOLDER`. It reads the runs in the folder and writes nothing.

The folder is the argument, else what DIPTYCH_RUNS names, else `runs`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import streamlit as st

from dashboard import compare_page


def chosen_root() -> Path:
    """The folder of runs."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_RUNS", "runs"))


st.set_page_config(page_title="Diptych", layout="wide")
compare_page.show(chosen_root())
