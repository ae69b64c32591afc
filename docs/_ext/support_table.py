"""The directive ``support-table``: what every routine does on every array library, from the registry of the tests."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

TESTS = Path(__file__).parents[2] / "tests"


def _row(cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


class SupportTable(SphinxDirective):
    """A table with a row for each routine and a column for each ability."""

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        sys.path.insert(0, str(TESTS))
        try:
            from support import ABILITIES, REGISTRY
        finally:
            sys.path.remove(str(TESTS))
        self.env.note_dependency(str(TESTS / "support.py"))
        titles = ["routine", *ABILITIES]
        group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in titles), cols=len(titles))
        group += nodes.thead("", _row([nodes.Text(title) for title in titles]))
        body = nodes.tbody()
        for name, entry in REGISTRY.items():
            marks = [nodes.Text("yes" if ability not in entry.lacks else "no") for ability in ABILITIES]
            body += _row([nodes.literal("", name), *marks])
        group += body
        return [nodes.table("", group, classes=["support"])]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("support-table", SupportTable)
    return {"parallel_read_safe": True}
