"""Parts of a page as HTML: panels, plots, tables. Pictures are inside, as PNG data.

Used by `report.py` and by pipeline/preview.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .pictures import Panel, page_picture, strip_image
from .plots import Plot


def panels_html(title: str, text: str, panels: Sequence[Panel]) -> str:
    """A section: heading, text, and its panels; nothing without panels."""
    if not panels:
        return ""
    parts = [f"<h2>{title}</h2>", f"<p>{escape(text)}</p>", *map(panel_html, panels)]
    return "\n".join(parts)


def panel_html(panel: Panel) -> str:
    """A grid of names and strips; names of forecasts stand where context tiles would."""
    num_columns = len(panel.columns)
    times = "".join(f"<span>{escape(text)}</span>" for text in panel.columns)
    rows = []
    for strip in panel.strips:
        kind = "name" if len(strip.tiles) == num_columns else "name late"
        picture, format_name = page_picture(strip_image(strip))
        rows.append(
            f'<div class="{kind}" style="--free: {num_columns - len(strip.tiles)}">'
            f"{escape(strip.label)}</div>"
            f'<img style="--tiles: {len(strip.tiles)}" alt="{escape(strip.alt)}" '
            f'src="{data_uri(picture, kind=format_name)}">'
        )
    legend = "".join(
        f'<li><i style="background: rgb({red} {green} {blue})"></i>{escape(name)}</li>'
        for name, (red, green, blue) in panel.legend
    )
    return f"""<h3>{escape(panel.title)}</h3>
<div class="panel" style="--columns: {num_columns}">
<div class="times">{times}</div>
{"".join(rows)}
</div>
{f'<ul class="legend">{legend}</ul>' if legend else ""}"""


def plot_html(plot: Plot) -> str:
    """The dark version where the reader's page is dark, the light one elsewhere."""
    return f"""<figure class="wide plot"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{data_uri(plot.dark)}">
<img src="{data_uri(plot.light)}" alt="{escape(plot.alt)}" width="640">
</picture></figure>"""


def facts_html(facts: Mapping[str, Any]) -> str:
    """A table of names and values."""
    lines = "\n".join(
        f"<tr><td>{_name(name)}</td><td>{escape(value_text(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>\n{lines}\n</tbody></table>'


def _name(text: str) -> str:
    """A name that may go on on the next line after a dot or an underscore."""
    return re.sub(r"([._])", r"\1<wbr>", escape(text))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined with dots."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def value_text(value: Any) -> str:
    """A JSON value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "; ".join(
            f"{name.replace('_', ' ')} {value_text(item)}" for name, item in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "-"
    return value if isinstance(value, str) else json.dumps(value)


def table_html(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "\n".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>" for cells in body
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def _cell(text: str) -> str:
    """A cell's text; an interval `[low, high]` behind a number on a line of its own."""
    value, space, interval = text.partition(" [")
    if not (space and interval.endswith("]")):
        return escape(text)
    return f"{escape(value)}<small>[{escape(interval)}</small>"


def data_uri(picture: bytes, *, kind: str = "png") -> str:
    """The bytes of a picture of MIME type image/KIND as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
