"""Formulas as MathML, made at build time: no script, no font, nothing fetched."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _converted(text: str, node: nodes.Node, display: str) -> str:
    try:
        return convert(re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", text), display=display)
    except Exception as error:  # of any kind, for what the converter does not know
        logger.warning("formula not understood, %r: %s", error, text, location=node)
        return text


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(_converted(node.astext(), node, "inline"))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    # one display a line: latex2mathml knows no alignment
    lines = filter(str.strip, re.split(r"\\\\|\n\n", node.astext()))
    displays = "".join(_converted(line, node, "block") for line in lines)
    self.body.append(f'<div class="formula">{displays}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True}
