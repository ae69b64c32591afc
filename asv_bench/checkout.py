"""An environment of asv that builds and downloads nothing: the interpreter asv runs in, a commit first on its path.

asv's own "existing" environment cannot change commits, which `asv continuous` must, and writes the path of the
interpreter into the results; its virtual environments download what they install.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from asv.environment import Environment, get_env_name
from asv.util import check_output

RECORDED = (
    "numpy",
    "scipy",
    "torch",
    "jax",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "array-api-compat",
    "scikit-learn",
    "optax",
)


def versions() -> dict[str, str]:
    """Installed versions, which the results are stored with."""
    found = {}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Checkout(Environment):
    """See the module."""

    tool_name = "checkout"

    def __init__(self, conf, python, requirements, tagged_env_vars):
        self._python, self._requirements = python, requirements | versions()
        super().__init__(conf, python, self._requirements, tagged_env_vars)

    @property
    def name(self):
        return get_env_name(self.tool_name, self._python, {}, self._tagged_env_vars)

    def _setup(self):
        Path(self._path).mkdir(parents=True)

    def find_executable(self, _):
        return sys.executable

    def run(self, args, **kwargs):
        """Run Python; a benchmark keeps the one variable, and the processes that it starts need the other."""
        paths = dict.fromkeys(("PYTHONPATH", "ASV_PYTHONPATH"), self._build_root)
        env = (kwargs.pop("env", None) or dict(os.environ)) | self._global_env_vars | paths
        return check_output([sys.executable, *args], env=env, **kwargs)
