"""Formulas become MathML when the documentation is built: pages fetch nothing to show them."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Replace what arithmatex left for a script."""
    return _FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    kind, opening, formula = found.groups()
    made = convert(unescape(formula), display="block" if opening == "[" else "inline")
    return f'<{kind} class="formula">{made}</{kind}>'
