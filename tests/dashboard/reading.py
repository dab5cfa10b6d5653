"""What a page run without a browser shows."""

from __future__ import annotations

import html
import re

from streamlit.testing.v1 import AppTest


def opened(app: AppTest, **in_url: str) -> AppTest:
    """Run it with this selection in the address."""
    for key, value in in_url.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception
    return app


def bodies(app: AppTest) -> list[str]:
    """The HTML parts of a page."""
    return [str(element.proto.body) for element in app.get("html")]


def table(app: AppTest, first: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table whose first heading is this."""
    body = next(body for body in bodies(app) if f"<tr><th>{first}</th>" in body)
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
    headings, *cells = [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]
    return headings, cells
