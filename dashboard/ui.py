"""Parts that pages share: text as it is, choices kept in the URL, figures with their downloads, tiles."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from dashboard import theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import


def plain(text: str) -> str:
    """Text as it is, for places that would read it as Markdown."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|$~:-])", r"\\\1", text)


def chosen(key: str, options: Sequence[str], default: str) -> str:
    """What a selectbox with this key is to show: what the URL says, if it is an option, else what it showed last.

    The URL is looked at again whenever it says something else than `remember` wrote, so that links work within a page.
    """
    in_url, written = st.query_params.get(key), st.session_state.get(f"url:{key}")
    known = st.session_state.get(key)
    if in_url in options and (in_url != written or known not in options):
        value = in_url
    else:
        value = known if known in options else default
        if in_url is not None and in_url != written:
            _say_not_followed(key, in_url, str(value))
    # Said anew each time: another page's widget with this key is another widget, and begins with its first option.
    st.session_state[key] = value
    return str(value)


def _say_not_followed(key: str, in_url: str, instead: str) -> None:
    """A link that asks for what is not there is answered in words, until something else is chosen."""
    st.warning(plain(f"The link asks for {key}={in_url}, which is not there; here is {instead}."))


def remember(key: str, value: str) -> None:
    """Put a choice into the URL, so that a copied link leads to the same view."""
    st.session_state[f"url:{key}"] = value
    if st.query_params.get(key) != value:
        st.query_params[key] = value


def select(
    label: str, key: str, options: Sequence[str], default: str, show: Callable[[str], str] = str, **more: Any
) -> str:
    """A selectbox whose value is in the URL."""
    chosen(key, options, default)
    value = str(st.selectbox(label, options, key=key, format_func=show, **more))
    remember(key, value)
    return value


def segments(label: str, key: str, options: Mapping[str, str], default: str) -> str:
    """A row of buttons of which one is down (value -> text), in the URL."""
    chosen(key, list(options), default)
    value = st.segmented_control(
        label,
        list(options),
        key=key,
        format_func=lambda value: options[value],
        required=True,
        label_visibility="collapsed",
    )
    remember(key, str(value))
    return str(value)


def figure(
    name: str, drawn: go.Figure, on_paper: Callable[[], Figure], data: Callable[[], pd.DataFrame], alt: str
) -> None:
    """An interactive figure with its downloads: the same one on paper as PNG and SVG, and its data as CSV.

    The files are made only when they are asked for.
    """
    config = {"displaylogo": False, "modeBarButtonsToRemove": _NO}
    st.plotly_chart(revised(drawn), key=f"figure:{name}", config=config, alt=alt)
    downloads(name, on_paper, data)


def revised(drawn: go.Figure) -> go.Figure:
    """The figure, marked with a digest of what it shows.

    Streamlit hands every figure to plotly.js twice, the second time as a copy. Without a mark plotly.js takes the copy
    for new data, and draws all of it again.
    """
    if drawn.layout.datarevision is not None:
        return drawn
    digest = hashlib.blake2b(str(drawn.to_json(validate=False)).encode(), digest_size=8).hexdigest()
    return drawn.update_layout(datarevision=digest)


_NO = ["lasso2d", "select2d", "autoScale2d"]


def downloads(name: str, on_paper: Callable[[], Figure] | None, data: Callable[[], pd.DataFrame]) -> None:
    """Small buttons below a figure or table."""
    with st.container(horizontal=True, horizontal_alignment="right", gap="small", key=f"downloads-{name}"):
        if on_paper is not None:
            for kind, mime in (("png", "image/png"), ("svg", "image/svg+xml")):
                st.download_button(
                    kind.upper(),
                    lambda kind=kind: _image(on_paper(), kind),  # type: ignore[misc]
                    f"{name}.{kind}",
                    mime,
                    key=f"{name}.{kind}",
                    type="tertiary",
                    icon=":material/download:",
                    on_click="ignore",
                )
        st.download_button(
            "CSV",
            lambda: data().to_csv(index=False),
            f"{name}.csv",
            "text/csv",
            key=f"{name}.csv",
            type="tertiary",
            icon=":material/download:",
            on_click="ignore",
        )


def _image(drawn: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=kind, dpi=160)
    return buffer.getvalue()


def swatch(place: int) -> str:
    """A small square in the colour of a run."""
    return f'<i style="background:{theme.colours()[place]}"></i>'


def tile(name: str, change: str, both: tuple[str, str], below: str) -> str:
    """One headline figure as HTML: the difference in large, both runs' figures, and what the difference is worth."""
    a, b = (f"<span>{swatch(place)}{html.escape(text)}</span>" for place, text in enumerate(both))
    return (
        f'<div class="dp-tile"><div class="name">{html.escape(name)}</div>'
        f'<div class="change">{html.escape(change)}</div><div class="both">{a}{b}</div>'
        f'<div class="noise">{html.escape(below)}</div></div>'
    )


def tiles(parts: Sequence[str]) -> None:
    """A row of them."""
    st.html(f'<div class="dp-tiles">{"".join(parts)}</div>')


def verdict(text: str, good: bool) -> None:
    """A line that answers the page's question."""
    colours = theme.colours()
    st.html(f'<div class="dp-verdict" style="border-color:{colours[2 if good else 1]}">{html.escape(text)}</div>')


def note(text: str) -> None:
    """Small print."""
    st.html(f'<div class="dp-note">{html.escape(text)}</div>')


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], links: Sequence[str] | None = None) -> None:
    """Rows of text; the first column stands left, the others right. `links`: where a click on a row's first leads."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = []
    for at, row in enumerate(rows):
        cells = [html.escape(cell) for cell in row]
        if links is not None:
            cells[0] = f'<a href="{html.escape(links[at])}" target="_self">{cells[0]}</a>'
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    st.html(f'<table class="dp-table"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>')


def number(label: str, key: str, default: float, low: float, high: float, step: float) -> float:
    """A number within limits, kept in the URL; whole where `step` is a whole number."""
    whole = isinstance(step, int)
    in_url, written = st.query_params.get(key), st.session_state.get(f"url:{key}")
    if key not in st.session_state:
        st.session_state[key] = default
    if in_url is not None and in_url != written:
        try:
            wanted = int(in_url) if whole else float(in_url)
        except ValueError:
            wanted = math.nan
        if not low <= wanted <= high:
            wanted = default
            _say_not_followed(key, in_url, f"{default:g}")
        st.session_state[key] = wanted
    st.session_state[key] = st.session_state[key]  # as in `chosen`
    value = st.number_input(label, min_value=low, max_value=high, step=step, key=key)
    remember(key, f"{value:g}" if not whole else str(value))
    return value


def text(label: str, key: str, hint: str) -> str:
    """A line of text, kept in the URL where there is any."""
    in_url, written = st.query_params.get(key), st.session_state.get(f"url:{key}")
    if key not in st.session_state or (in_url is not None and in_url != written):
        st.session_state[key] = in_url or ""
    st.session_state[key] = st.session_state[key]  # as in `chosen`
    value = str(st.text_input(label, key=key, placeholder=hint) or "").strip()
    if value:
        remember(key, value)
    else:
        st.query_params.pop(key, None)
        st.session_state.pop(f"url:{key}", None)
    return value


def open_select(label: str, key: str, options: Sequence[str], default: str, hint: str) -> str:
    """A selectbox that also takes what is typed, kept in the URL."""
    in_url, written = st.query_params.get(key), st.session_state.get(f"url:{key}")
    if in_url is not None and in_url != written:
        st.session_state[key] = in_url
    current = st.session_state[key] = st.session_state.get(key, default)
    known = list(options) if current in options else [*options, current]
    value = str(st.selectbox(label, known, key=key, accept_new_options=True, help=hint) or default)
    remember(key, value)
    return value


def value_tile(name: str, value: str, below: str) -> str:
    """A headline figure of one run, as HTML."""
    return (
        f'<div class="dp-tile"><div class="name">{html.escape(name)}</div>'
        f'<div class="change">{html.escape(value)}</div>'
        f'<div class="noise">{html.escape(below)}</div></div>'
    )
