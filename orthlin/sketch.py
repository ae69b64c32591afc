"""Test matrices for the range finder, drawn from an explicit source of random numbers.

Every function takes ``like``, an array whose library, device and dtype the result has, and ``rng``:

=============================  ==================================================================
``rng``                        where the numbers come from
=============================  ==================================================================
None                           fresh, on the device of ``like``; not reproducible
int, ``SeedSequence``          a generator of the array library, made from the seed, on that device
``numpy.random.Generator``     drawn on the host in float64: the same matrix on every library
``torch.Generator``,           used as it is, with arrays of its own library
``cupy.random.Generator``,
JAX key
=============================  ==================================================================

No global random state is read or written.  Arrays of a library without random numbers take the host's.
A CuPy generator made from a seed initializes the state of every thread of the device (270,000 on an H100): where one
draw follows another, pass a generator.
"""

import math
from typing import Any

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin._signs import signs

Array = Any
KINDS = ("gaussian", "sparse_sign", "columns")

__all__ = ["columns", "gaussian", "sparse_sign"]


@be.own_settings
def gaussian(n: int, width: int, /, *, like: Array, rng: Any = None) -> Array:
    """Matrix of independent standard normal numbers.

    Parameters
    ----------
    n, width : int
        Shape of the matrix.
    like : array
        Floating-point array whose library, device and dtype the result has.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see the table of this module.

    Returns
    -------
    array, shape (n, width)
        Real or, for complex `like`, complex normal numbers of mean zero and variance one.

    Raises
    ------
    RankError
        If `n` or `width` is not an integer of at least zero.
    RngError, DeviceError
        If `rng` is not a source for arrays like `like`.

    Notes
    -----
    Cost: n width normal numbers, drawn and written once, which is the least; twice as many for complex matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from orthlin import sketch
    >>> sketch.gaussian(1000, 3, like=np.ones(1, dtype=np.float32), rng=0).shape
    (1000, 3)
    """
    xp, shape = _arguments(n, width, like)
    source = be.random_source(rng, like)
    omega = source.normal(shape)
    if be.is_complex(xp, like):
        omega = (omega + 1j * source.normal(shape)) * math.sqrt(0.5)
    return be.transfer(xp, omega, like)


@be.own_settings
def sparse_sign(n: int, width: int, /, *, like: Array, rng: Any = None, nonzeros: int = 8) -> Array:
    """Matrix with a fixed number of nonzeros in each row, random signs at random places.

    The nonzeros are +-1/sqrt(nonzeros), so the expected square of a column's norm is n/width.  In a block of `width`
    rows the places are those of the row before, shifted by one, and each block starts anew: two rows of a block share
    no place of the same turn, two of different blocks one with probability 1/width, and a product is a sum of blocks.

    Parameters
    ----------
    n, width : int
        Shape of the matrix.
    like : array
        Floating-point array whose library, device and dtype the result has.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see the table of this module.
    nonzeros : int
        Nonzeros in each row; at most `width` of them are taken.

    Returns
    -------
    array, shape (n, width)
        The test matrix.

    Raises
    ------
    RankError
        If `n`, `width` or `nonzeros` is not an admissible integer.
    RngError, DeviceError
        If `rng` is not a source for arrays like `like`.

    Notes
    -----
    Cost: n (1 + nonzeros) uniform numbers, and n width numbers written; the least is `nonzeros` signs a row.

    References
    ----------
    Martinsson and Tropp, Randomized numerical linear algebra, Acta Numerica 29 (2020), section 9.2.

    Examples
    --------
    >>> import numpy as np
    >>> from orthlin import sketch
    >>> omega = sketch.sparse_sign(100, 20, like=np.ones(1), rng=0, nonzeros=4)
    >>> int(np.count_nonzero(omega)), np.unique(np.abs(omega)).tolist()
    (400, [0.0, 0.5])
    """
    xp, shape = _arguments(n, width, like)
    sxp, shifts, values = signs(*shape, like, rng, check.count(nonzeros, "nonzeros", low=1))
    omega = sxp.zeros(shape, dtype=values.dtype, device=be.device(values))
    column = sxp.arange(shape[1], device=be.device(values))
    place = (column[None, :] - column[:, None]) % max(shape[1], 1)  # shifts that hit it
    for t in range(values.shape[0]):
        hit = sxp.reshape(place[None, ...] == shifts[:, t, None, None], (-1, shape[1]))[: shape[0], :]
        omega = sxp.where(hit, values[t, :, None], omega)
    return be.transfer(xp, omega, like)


@be.own_settings
def columns(n: int, width: int, /, *, like: Array, rng: Any = None) -> Array:
    """Indices of distinct columns, uniformly out of all of them.

    Parameters
    ----------
    n : int
        How many columns there are to choose from.
    width : int
        How many to choose, at most `n`.
    like : array
        Floating-point array whose library and device the result has.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see the table of this module.

    Returns
    -------
    array of integers, shape (width,)
        The indices, in random order.

    Raises
    ------
    RankError
        If `n` or `width` is not an admissible integer.
    RngError, DeviceError
        If `rng` is not a source for arrays like `like`.

    Notes
    -----
    Cost: n uniform numbers and a sort of them, whatever `width` is; the least is `width` of them.

    Examples
    --------
    >>> import numpy as np
    >>> from orthlin import sketch
    >>> sorted(sketch.columns(4, 4, like=np.ones(1), rng=0).tolist())
    [0, 1, 2, 3]
    """
    xp, _ = _arguments(n, width, like)
    check.count(width, "width", high=n)
    source = be.random_source(rng, like)
    chosen = source.xp.argsort(source.uniform((n,)))[:width]
    return be.transfer(xp, chosen, like)


def _arguments(n: int, width: int, like: Array) -> tuple[Any, tuple[int, int]]:
    return check.array(like, "like"), (check.count(n, "n"), check.count(width, "width"))
