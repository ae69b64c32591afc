"""A warning, which -W makes an error, for every public name without a page."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

MODULES = (
    "orthlin",
    "orthlin.errors",
    "orthlin.jax",
    "orthlin.metrics",
    "orthlin.schedules",
    "orthlin.sketch",
    "orthlin.steppers",
    "orthlin.torch",
    "orthlin.torch.gpt2",
)
logger = logging.getLogger(__name__)


def public_names() -> Iterator[str]:
    """Every name of the public modules that is no module itself."""
    for module in MODULES:
        for name in import_module(module).__all__:
            if f"{module}.{name}" not in MODULES:
                yield f"{module}.{name}"


def missing(documented: Any) -> list[str]:
    """Public names that are not among the documented ones."""
    return [name for name in public_names() if name not in documented]


def _check(_: Sphinx, env: BuildEnvironment) -> None:
    for name in missing(env.domaindata["py"]["objects"]):
        logger.warning("%s is public and has no page; add it to docs/api", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Check when all pages are read."""
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True}
