"""HTML pages in one file each: text, tables and pictures in the style that all of them have."""

import base64
import html
from collections.abc import Sequence

from contrastseg_jax.data.pictures import printable

# Tables and pictures scroll by themselves where a screen is narrow, so that the text need not.
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;"
    "padding:0 1em;overflow-wrap:anywhere}"
    "h1{font-size:1.6em}h2{font-size:1.15em;margin:2em 0 .5em}h1,h2{line-height:1.25}"
    "div{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:3px 1.2em 3px 0;text-align:right;white-space:nowrap}"
    ".name{text-align:left;white-space:normal;overflow-wrap:normal}"
    "th{border-bottom:1px solid #999;white-space:normal;overflow-wrap:normal;vertical-align:bottom}"
    "tr:nth-child(even) td{background:#f4f4f4}"
    "img{max-width:100%;min-width:600px;height:auto}"
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


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1) -> str:
    """Rows under a header; names in the first columns, `num_names`, and numbers in the others."""
    lines = [_row(header, "th", num_names), *(_row(row, "td", num_names) for row in rows)]
    return f"<div><table>{''.join(lines)}</table></div>"


def html_picture(source: str, alt: str) -> str:
    """A picture. `source`: its address, or `inline` of it; `alt`: what it shows."""
    return f'<div><img src="{source}" alt="{html_text(alt)}"></div>'


def inline(png: bytes) -> str:
    """The source of a picture that lies in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _row(cells: Sequence[str], tag: str, num_names: int) -> str:
    starts = (f"<{tag} class=name>" if i < num_names else f"<{tag}>" for i in range(len(cells)))
    texts = map(html_text, cells)
    return f"<tr>{''.join(f'{a}{b}</{tag}>' for a, b in zip(starts, texts, strict=True))}</tr>"
