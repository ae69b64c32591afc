"""CPUs with units for half precision, and without, as all are where this is imported, until they are feigned."""

from contextlib import contextmanager
from unittest import mock

import torch

from orthlin._backend.settings import units

torch.cpu.get_capabilities = dict


@contextmanager
def feigned(**found):
    """Units of any CPU, or those given; where there are none, torch multiplies the same numbers more slowly."""
    found = found or dict.fromkeys(("avx512_bf16", "avx512_fp16"), True)
    units.cache_clear()
    with mock.patch.object(torch.cpu, "get_capabilities", return_value=found):
        yield
    units.cache_clear()
