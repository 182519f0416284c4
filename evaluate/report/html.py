"""Pages from the templates beside this file: jinja2 with autoescape, pictures inside as data."""

import base64
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from .pictures import Strip, page_picture, strip_image
from .rows import show, show_interval


def render_page(template: str, values: Mapping[str, Any], *, package: str = __package__) -> str:
    """The page that a template makes of the values. `package`: has it in its templates/, which may
    extend base.html.j2 and import parts.html.j2 of this one."""
    return _environment(package).get_template(template).render(values)


@functools.cache
def _environment(package: str) -> Environment:
    packages = dict.fromkeys((package, __package__))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "breakable": _breakable,
        "data_uri": data_uri,
        "film_uri": _film_uri,
        "show": show,
        "show_interval": show_interval,
        "strip_uri": _strip_uri,
        "text": value_text,
    }
    return environment


def data_uri(picture: bytes, kind: str = "png") -> str:
    """The bytes of a picture of MIME type image/KIND as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def value_text(value: Any) -> str:
    """A JSON value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        pairs = (f"{name.replace('_', ' ')} {value_text(item)}" for name, item in value.items())
        return "; ".join(pairs) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value) or "-"
    return value if isinstance(value, str) else json.dumps(value)


def _breakable(name: str) -> Markup:
    """A name that may go on on the next line after a dot or an underscore."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def _strip_uri(strip: Strip) -> str:
    picture, kind = page_picture(strip_image(strip))
    return data_uri(picture, kind)


def _film_uri(strip: Strip) -> str:
    """The tiles side by side without gaps, of which the page shows one at a time."""
    picture, kind = page_picture(Image.fromarray(np.concatenate(strip.tiles, axis=1)))
    return data_uri(picture, kind)
