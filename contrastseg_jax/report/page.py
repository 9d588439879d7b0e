"""HTML pages in one file each: text, tables and pictures in the style that all of them have."""

import base64
import html
from collections.abc import Sequence

from contrastseg_jax.data.pictures import printable

# Tables scroll by themselves where a screen is narrow, so that the text need not.
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;"
    "padding:0 1em;overflow-wrap:anywhere}"
    "h1{font-size:1.6em}h2{font-size:1.15em;margin:2em 0 .5em}h1,h2{line-height:1.25}"
    "div{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:3px 1.2em 3px 0;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}"
    "th{border-bottom:1px solid #999}tr:nth-child(even) td{background:#f4f4f4}"
    "img{max-width:100%;height:auto}"
)


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page with a headline; `parts`: HTML, one below the other."""
    name = html_text(title)
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style>"
    )
    return "\n".join([head, f"<h1>{name}</h1>", *parts, ""])


def html_text(text: str) -> str:
    """Text as it is, in HTML."""
    return html.escape(printable(text))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header; the first column names them."""
    lines = [_row(header, "th"), *(_row(row, "td") for row in rows)]
    return f"<div><table>{''.join(lines)}</table></div>"


def html_picture(png: bytes, alt: str) -> str:
    """A picture in the page itself. `alt`: what it shows."""
    data = base64.b64encode(png).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{html_text(alt)}"></p>'


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html_text(cell)}</{tag}>' for cell in cells)}</tr>"
