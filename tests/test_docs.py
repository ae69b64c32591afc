"""Every block of Python in README and the documentation runs, and every public name has a page."""

import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

import fakecupy
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documentation is not part of a source distribution", allow_module_level=True)
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


def model():
    """A tiny model of transformers, for pages that have one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.filterwarnings("ignore")  # of trainers and their loggers
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Its blocks one after the other, as somebody who reads it would, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page", "np": np}
    blocks = BLOCK.findall(page.read_text())
    if any("(model" in block for block in blocks) and not any("model = " in block for block in blocks):
        names["model"] = model()
    for block in blocks:
        code = compile(block, str(page), "exec")
        if "cupy" in block:
            with fakecupy.standing_in():
                exec(code, names)
        else:
            exec(code, names)


def extension(name):
    """An extension of the documentation, which Sphinx is not needed for."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {n: mock.MagicMock() for n in SPHINX}):
        spec.loader.exec_module(module)
    return module


SPHINX = ("sphinx", "sphinx.application", "sphinx.environment", "sphinx.util")


def test_every_public_name_is_in_a_table_of_the_api():
    public = extension("public_names")
    found = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        module = ""
        for line in page.read_text().splitlines():
            if match := re.match(r"\.\. (?:currentmodule|automodule):: (\S+)", line):
                module = match[1]
                if module == "orthlin.errors":
                    found |= {name for name in public.public_names() if name.startswith("orthlin.errors.")}
            elif match := re.match(r"(?:    |\.\. autodata:: )(\w+)$", line):
                found.add(f"{module}.{match[1]}")
    assert public.missing(found) == []
    assert public.missing(found - {"orthlin.qr"}) == ["orthlin.qr"]


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            path = (page.parent / target).resolve()
            example = ROOT / "docs" / "examples" / f"{path.name.replace('index', 'GALLERY_HEADER')}"
            made = path.parent == ROOT / "docs" / "gallery"  # by the build, from the examples
            assert path.exists() or (made and list(example.parent.glob(f"{example.name}.*"))), (page, target)


def test_a_dead_link_of_the_built_site_is_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b c.html").write_text('<h1 id="there"></h1><a href="../a.html#top">é</a>', encoding="utf-8")
    (tmp_path / "a.html").write_text(
        '<a name="top"></a><a href="#top"></a><a href="sub/b%20c.html?q=1#there"></a><a href="https://elsewhere"></a>'
        '<a href="sub"></a><a href="#gone"></a><a href="sub/b%20c.html#gone"></a><img src="gone.png">',
        encoding="utf-8",
    )
    dead = ["#gone", "gone.png", "sub/b%20c.html#gone"]
    assert extension("dead_links").dead(tmp_path) == [("a.html", link) for link in dead]


def test_every_page_is_in_a_table_of_contents():
    listed = {"index", "README"}
    for page in PAGES[1:]:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            entries = (line.strip() for line in block.splitlines() if line and line[0] != ":")
            listed |= {made.stem for entry in entries for made in page.parent.glob(f"{entry}.md")}
    assert {page.stem for page in PAGES} <= listed
