"""Configuration of the documentation; ``python -m sphinx -W -n --keep-going docs docs/_build`` builds it."""

import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext")]

project, author, version = "orthlin", "The orthlin developers", metadata.version("orthlin")
copyright = author
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    "dead_links",
    "mathml",
    "public_names",
    "support_table",
]
exclude_patterns = ["_build", "_ext", "_templates", "examples", "**/sg_execution_times.rst", "sg_execution_times.rst"]
templates_path = ["_templates"]
default_role = "literal"  # the docstrings write `name` for what they mean as code
suppress_warnings = ["config.cache"]  # of functions among the options of the gallery

# Names of other libraries have no page here, and no inventory is fetched: what is checked is our own.
nitpick_ignore_regex = [(r"py:.*", r"(?!orthlin).*")]

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings have them in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "orthlin"
html_static_path = ["_static"]
html_css_files = ["orthlin.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_prev_next": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": []}

sphinx_gallery_conf = {
    "examples_dirs": ["examples"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": "api/backreferences",
    "doc_module": ("orthlin",),
    "abort_on_example_error": True,
    "min_reported_time": 0,
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "inspect_global_variables": False,
}


def skip_field(_app, _what, _name, obj, skip, _options):
    """Skip the fields of named tuples, which their docstrings have as attributes."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def draw_benchmarks(_app):
    """Draw the page of benchmarks from the stored results."""
    subprocess.run([sys.executable, HERE.parent / "asv_bench" / "page.py"], check=True)


def setup(app):
    """Draw the benchmarks, connect to the reading of docstrings."""
    app.connect("builder-inited", draw_benchmarks)
    app.connect("autodoc-skip-member", skip_field)


warnings.filterwarnings("ignore", message=r".*FigureCanvasAgg is non-interactive.*")
