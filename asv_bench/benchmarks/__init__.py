"""Benchmarks of orthlin: one module a layer, `ratios` for what is compared call by call, `counts` for devices."""

import os
from pathlib import Path

import orthlin

checkout = os.environ.get("ASV_PYTHONPATH")
if checkout and not Path(orthlin.__file__).is_relative_to(checkout):
    raise ImportError(f"orthlin: expected the one of the commit, in {checkout}, got {orthlin.__file__}")
