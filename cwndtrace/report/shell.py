# SPDX-License-Identifier: Apache-2.0
"""What all pages share: their style, script and macros, and how texts from outside get into them.

A page makes no outside request. All text goes through Jinja2's escaping and ``format.clean``. The content security
policy allows only the page's own script and style, by their hashes, and pictures in data URLs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from cwndtrace import format as fmt
from cwndtrace.analysis.verdict import CANT_TELL
from cwndtrace.format import clean


def environment(filters: Mapping[str, Callable[..., Any]]) -> Environment:
    """Return an environment for the templates of this package, with those ``filters`` and those that all pages use."""
    made = Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_file))
    made.filters |= {
        "clean": lambda text: clean(str(text)),
        "pair": lambda text: _unbroken(clean(text).replace(" > ", "\u00a0> ")),
        "prose": lambda text: _unbroken(fmt.unbroken(clean(str(text)))),
        "counted": fmt.plural,
        "span": lambda us: fmt.span(us) if us is not None else "unknown",
        "size": fmt.size,
        "colour": lambda label: "bad" if label == "harmful" else "open" if label in CANT_TELL else "good",
        **filters,
    }
    return made


def render(made: Environment, template: str, **values: Any) -> str:
    """Return the page of a template, to which ``values`` and the style and the script of all pages are given."""
    style, script = _file("page.css"), _file("page.js")
    text: str = made.get_template(template).render(
        **values,
        # These two are files of this package, so they need no escaping.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return text


def _unbroken(text: str) -> Markup:
    """Return HTML for a text, with no-break spaces as entities, because the character itself counts as unprintable."""
    return escape(text).replace("\u00a0", Markup("&nbsp;"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
