"""The reader's own latency objectives, kept in the URL."""

from __future__ import annotations

import math

import streamlit as st

from experiments.compare import TITLES

FIELDS = {"ttft": "slo-ttft", "tpot": "slo-tpot", "e2el": "slo-e2e"}
"""Objective -> its name in the URL."""


def objectives() -> dict[str, float]:
    """Three fields in a row; those that are filled, in milliseconds."""
    found = {}
    with st.container(horizontal=True, vertical_alignment="bottom", key="objectives"):
        for name, key in FIELDS.items():
            in_url, written = st.query_params.get(key), st.session_state.get(f"url:{key}")
            if key not in st.session_state or (in_url is not None and in_url != written):
                st.session_state[key] = _number(in_url)
            st.session_state[key] = st.session_state[key]  # as in `ui.chosen`
            value = st.number_input(
                f"Goodput: {TITLES[name]} within (ms)", min_value=0.0, step=10.0, key=key, placeholder="any", width=240
            )
            if value is None:
                st.query_params.pop(key, None)
                st.session_state.pop(f"url:{key}", None)
                continue
            found[name] = float(value)
            text = f"{value:.12g}"
            st.session_state[f"url:{key}"] = text
            if in_url != text:
                st.query_params[key] = text
    return found


def _number(text: str | None) -> float | None:
    """None for what is no objective."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
