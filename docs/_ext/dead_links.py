"""A warning, which -W makes an error, for every link of a page to a page, file or heading that is not there."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {found.get("id") or "", found.get("name") or ""}
        self.links |= {found.get("href") or "", found.get("src") or ""}


def dead(root: Path) -> list[tuple[str, str]]:
    """Page and link of all that lead nowhere in the folder of a site."""
    paths = (path for path in root.rglob("*.html") if "_static" not in path.parts)
    pages = {path.resolve(): _Page(path) for path in paths}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            named = target not in pages or unquote(parts.fragment) in pages[target].names
            if not (target.exists() and named):
                found.append((path.relative_to(root.resolve()).as_posix(), link))
    return found


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        for page, link in dead(Path(app.outdir)):
            logger.warning("%s: dead link %r", page, link)


def setup(app: Sphinx) -> dict[str, Any]:
    """Look at what was built."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True}
