"""Choosing two runs, as several pages do, and what they say where there is nothing to choose."""

from __future__ import annotations

import os
from pathlib import Path

import streamlit as st

from dashboard.store import Entry, list_runs
from dashboard.ui import plain, select


def readable_runs(root: Path) -> list[Entry] | None:
    """The runs under the root that can be opened; the others are named with the reason. None, and said, without a
    folder."""
    if not root.is_dir():
        st.error(plain(f"There is no folder {root}. Start the dashboard with the folder that holds your runs."))
        return None
    entries = list_runs(root)
    broken = [entry for entry in entries if entry.error]
    if broken:
        with st.expander(f"{len(broken)} folder{'s' * (len(broken) > 1)} cannot be read", icon=":material/warning:"):
            for entry in broken:
                st.warning(plain(f"{entry.name}: {entry.error}"))
    return [entry for entry in entries if not entry.error]


def pick_two(entries: list[Entry]) -> tuple[Entry, Entry]:
    """The reference run and the one beside it: where there are both, a real and a simulated one at first."""
    first = next((i for i, entry in enumerate(entries) if entry.kind == "real"), 0)
    others = [i for i in range(len(entries)) if i != first] or [first]
    simulated = [i for i in others if entries[i].kind == "sim"]
    # Of several simulations, the one whose name begins most like the reference's, letter by letter.
    alike = {i: len(os.path.commonprefix([entries[i].name, entries[first].name])) for i in simulated}  # noqa: RUF071
    second = max(alike, key=lambda i: alike[i]) if alike else others[0]
    by_name = {entry.name: entry for entry in entries}
    names = list(by_name)

    def show(name: str) -> str:
        return by_name[name].label

    left, right = st.columns(2, gap="medium")
    with left:
        a = select("Reference run", "a", names, names[first], show)
    with right:
        b = select("Beside it", "b", names, names[second], show)
    return by_name[a], by_name[b]
