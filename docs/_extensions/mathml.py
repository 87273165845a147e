"""Sphinx extension: formulas as MathML, which browsers draw by themselves, without scripts and without the network."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)
SPACE = '<mspace width="0.1667em"></mspace>'


def convert(node, **options):
    """MathML of a node's LaTeX, with TeX' thin spaces around the names of functions."""
    try:
        text = tex2mathml(node.astext(), **options)
    except MathError as error:
        logger.warning("%s in the formula %s", error, node.astext(), location=node)
        return node.astext()
    text = re.sub(r"<mo>&ApplyFunction;</mo>(?!\s*<mo [^>]*>\()", SPACE, text)
    return re.sub(r"(</m(?:i|n|sub|sup|frac)>\s*)(<mi>(?:log|max|min)</mi>)", rf"\1{SPACE}\2", text)


def inline(self, node):
    self.body.append(convert(node))
    raise nodes.SkipNode


def block(self, node):
    # it scrolls by itself where it is wider than a phone, and so has to be reachable with the keyboard
    self.body.append(f'<div class="formula" tabindex="0">{convert(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.config.html_math_renderer = "mathml"
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
