"""The one door to array libraries.

Only what the array API standard lacks, or what differs between libraries, stands in this package;
everything else calls the namespace directly.  Array libraries are imported inside functions, and only
once an array of theirs is at hand.

Two kinds of arrays are told apart.  A *host* array (NumPy, torch on the CPU outside a tracer) can be
looked at for nothing, so a routine may branch on its values.  Everything else (GPU arrays, JAX arrays
eager or traced, meta tensors) takes the *device* path: no value is read, hence nothing synchronises,
and eager and traced calls run the same code.
"""

from orthlin._backend.arrays import (
    Array,
    bound_device,
    convert,
    device,
    eps,
    is_complex,
    is_dense,
    is_half,
    is_host,
    kind,
    namespace,
    scalar,
    wide_dtype,
    working,
)
from orthlin._backend.libraries import Library, installed
from orthlin._backend.linalg import (
    add_product,
    adjoint,
    cholesky,
    choose,
    column_squares,
    eigh,
    eye_like,
    gram,
    inv,
    inv_lower,
    svd,
)
from orthlin._backend.powers import NOT_FINITE, exponent_bound, largest_exponent, ldexp, max_exponent
from orthlin._backend.random import Source, random_source, stream, transfer
from orthlin._backend.settings import own_settings, settings

__all__ = [
    "NOT_FINITE", "Array", "Library", "Source", "add_product", "adjoint", "bound_device", "cholesky", "choose",
    "column_squares", "convert", "device", "eigh", "eps", "exponent_bound", "eye_like", "gram", "installed", "inv",
    "inv_lower", "is_complex", "is_dense", "is_half", "is_host", "kind", "largest_exponent", "ldexp", "max_exponent",
    "namespace", "own_settings", "random_source", "scalar", "settings", "stream", "svd", "transfer", "wide_dtype",
    "working",
]  # fmt: skip
