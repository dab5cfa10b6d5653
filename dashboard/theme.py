"""How the dashboard looks: one palette for the two panels, in light and dark, and the styles of its parts."""

from __future__ import annotations

import streamlit as st

from experiments.series import COLOURS

DASHES = ("solid", "dash", "dot", "dashdot")

_ON_DARK = ("#56B4E9", "#F0894A", "#2FC49B", "#E39BC5", "#F0B93A", "#9AD3F5")
"""`COLOURS` in the same order, as light as a dark page needs."""


def dark() -> bool:
    """Whether the reader looks at a dark page."""
    return st.context.theme.get("type") == "dark"


def colours() -> tuple[str, ...]:
    """Colours of runs, in order: the first is the reference's. Told apart with any kind of colour vision."""
    return _ON_DARK if dark() else COLOURS


def ink() -> str:
    """Of thin lines that are no data: diagonals, zero, marks."""
    return "#9aa4b2" if dark() else "#6b7280"


CSS = """
<style>
[data-testid="stHeader"] { background: transparent; height: 2.6rem; pointer-events: none; }
[data-testid="stHeader"] div { pointer-events: none; }
[data-testid="stHeader"] button { pointer-events: auto; }
[data-testid="stMainBlockContainer"] { padding: 1.1rem 2.2rem 3rem; max-width: 1720px; margin: 0 auto; }
[data-testid="stStatusWidget"], [data-testid="stHeaderActionElements"] { display: none; }
h2 { font-size: 1.15rem !important; font-weight: 600 !important; padding: 1.1rem 0 0 !important; }
.dp-brand { font-size: 1.35rem; font-weight: 700; letter-spacing: -.02em; white-space: nowrap; line-height: 2.4rem; }
.dp-brand i { display: inline-block; width: .62rem; height: 1.15rem; border-radius: 2px; vertical-align: -.12rem; }
.dp-brand i + i { margin: 0 .55rem 0 .14rem; }
.dp-tiles { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .8rem; }
.dp-tile { border: 1px solid rgba(128,134,146,.28); border-radius: 10px; padding: .75rem .95rem .7rem; }
.dp-tile .name { font-size: .82rem; opacity: .75; }
.dp-tile .change { font-size: 1.65rem; font-weight: 650; line-height: 2.2rem; font-variant-numeric: tabular-nums; }
.dp-tile .both { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.dp-tile .both i, .dp-key i { display: inline-block; width: .6rem; height: .6rem; border-radius: 2px;
  margin-right: .35rem; }
.dp-tile .noise { font-size: .78rem; opacity: .7; padding-top: .15rem; }
.dp-verdict { border-left: 4px solid; border-radius: 4px; padding: .5rem .9rem; margin-top: .2rem;
  background: rgba(128,134,146,.09); font-size: .95rem; }
.dp-note { font-size: .84rem; opacity: .75; line-height: 1.45; }
.dp-key { font-size: .84rem; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.dp-table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
.dp-table th { font-weight: 600; opacity: .75; text-align: right; padding: .3rem .6rem;
  border-bottom: 1px solid rgba(128,134,146,.45); }
.dp-table td { text-align: right; padding: .28rem .6rem; border-bottom: 1px solid rgba(128,134,146,.18); }
.dp-table th:first-child, .dp-table td:first-child { text-align: left; white-space: nowrap; }
.dp-table a { color: inherit; text-decoration: underline; text-underline-offset: 2px; }
</style>
"""
"""Kept to what Streamlit's own options cannot say."""

STEADY = '<style>[data-stale="true"] { opacity: 1 !important; }</style>'
"""For a page that draws itself again every few seconds: without it what stands there turns pale each time."""
