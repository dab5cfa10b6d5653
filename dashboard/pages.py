"""The pages: where each is in the URL, and the bar above all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlencode

import streamlit as st

from dashboard import compare_page, live_page, policies_page, theme, timeline_page, try_page
from dashboard.ui import swatch

SELECTION = ("a", "b")
"""Choices that go along from page to page."""

_SHOW: dict[str, tuple[str, Callable[[Path], None]]] = {
    "compare": ("Compare", compare_page.show),
    "timeline": ("Timeline", timeline_page.show),
    "policies": ("Policies", policies_page.show),
    "try": ("Try", try_page.show),
    "live": ("Live", live_page.show),
}


def show(root: Path) -> None:
    """The bar, and below it the page that the URL names."""
    pages = {
        name: st.Page(_of(root, draw), title=title, url_path=name, default=name == "compare")
        for name, (title, draw) in _SHOW.items()
    }
    page = st.navigation(list(pages.values()), position="hidden")
    st.set_page_config(page_title=f"{page.title} · Diptych", page_icon="◫", layout="wide")
    st.html(theme.CSS)
    with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="bar"):
        st.html(f'<div class="dp-brand">{swatch(0)}{swatch(1)}Diptych</div>', width="content")
        for each in pages.values():
            st.page_link(each, query_params=_selection())
    page.run()


def _of(root: Path, draw: Callable[[Path], None]) -> Callable[[], None]:
    return lambda: draw(root)


def _selection() -> Mapping[str, str]:
    return {key: st.query_params[key] for key in SELECTION if key in st.query_params}


def link(page: str, **choices: str | int) -> str:
    """The address of a page with these choices, relative to any other page."""
    return f"{page}?{urlencode(choices)}"
