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
    counter,
    device,
    eps,
    factor,
    filled,
    from_numbers,
    is_complex,
    is_dense,
    is_half,
    is_host,
    is_number,
    is_single,
    kind,
    namespace,
    numbers,
    scalar,
    wide_dtype,
    working,
)
from orthlin._backend.derivative import Arrays, constant, differentiable
from orthlin._backend.libraries import Library, installed
from orthlin._backend.linalg import (
    PRECISIONS,
    add_product,
    add_to,
    adjoint,
    cholesky,
    choose,
    column_squares,
    eigh,
    eye_like,
    gram,
    inv,
    inv_lower,
    large_product,
    reduced,
    scaled,
    select,
    svd,
)
from orthlin._backend.loop import repeat
from orthlin._backend.powers import (
    KEEP,
    NOT_FINITE,
    clipped,
    exponent_bound,
    flushes_subnormals,
    largest_exponent,
    ldexp,
    max_exponent,
    nonzero,
    power_factor,
    safe_factor,
)
from orthlin._backend.random import Source, random_source, stream, transfer
from orthlin._backend.settings import attained, own_settings, products, settings

__all__ = [
    "KEEP", "NOT_FINITE", "PRECISIONS", "Array", "Arrays", "Library", "Source", "add_product", "add_to", "adjoint",
    "attained", "bound_device", "cholesky", "choose", "clipped", "column_squares", "constant", "convert", "counter",
    "device", "differentiable", "eigh", "eps", "exponent_bound", "eye_like", "factor", "filled",
    "flushes_subnormals", "from_numbers", "gram", "installed", "inv", "inv_lower", "is_complex", "is_dense",
    "is_half", "is_host", "is_number", "is_single", "kind", "large_product", "largest_exponent", "ldexp",
    "max_exponent", "namespace", "nonzero", "numbers", "own_settings", "power_factor", "products", "random_source",
    "reduced", "repeat", "safe_factor", "scalar", "scaled", "select", "settings", "stream", "svd", "transfer",
    "wide_dtype", "working",
]  # fmt: skip
