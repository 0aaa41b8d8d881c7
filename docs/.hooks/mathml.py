"""Formulas as MathML, written when the site is built: readers need no script and no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.+?)\\\]</div>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace what the arithmatex extension marked as TeX."""
    page_html = INLINE.sub(lambda found: convert(html.unescape(found[1])), page_html)
    return DISPLAY.sub(lambda found: convert(html.unescape(found[1]).strip(), display="block"), page_html)
