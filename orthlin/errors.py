"""The vocabulary of failures.

Every error derives from :class:`OrthlinError` and from the builtin that a caller would catch
without knowing this library.  The message names the argument, what was given and what is accepted.
"""

import numpy as np

__all__ = [
    "ArrayTypeError",
    "DTypeError",
    "DeviceError",
    "NonFiniteError",
    "OptionError",
    "OrthlinError",
    "RankError",
    "RngError",
    "ScheduleError",
    "ShapeError",
    "SingularError",
]


class OrthlinError(Exception):
    """Base class of every error that orthlin raises on purpose."""


class ArrayTypeError(OrthlinError, TypeError):
    """An argument is not an array that orthlin can work on, or arrays of two libraries were mixed."""


class DTypeError(OrthlinError, TypeError):
    """An array has a dtype that is not a real or complex floating-point type."""


class ShapeError(OrthlinError, ValueError):
    """An array has too few dimensions or a shape that does not fit the others."""


class DeviceError(OrthlinError, ValueError):
    """Arrays or generators that must live on one device live on several."""


class RankError(OrthlinError, ValueError):
    """A rank or a count is not an integer in its admissible range."""


class NonFiniteError(OrthlinError, ValueError):
    """An array on the host holds NaN or infinity."""


class OptionError(OrthlinError, ValueError):
    """An option has a value that is not among the accepted ones."""


class ScheduleError(OrthlinError, ValueError):
    """A polynomial schedule was to be applied outside its interval, its order or its precision."""


class RngError(OrthlinError, TypeError):
    """`rng` is not a source of random numbers that the array library accepts."""


class SingularError(OrthlinError, np.linalg.LinAlgError):
    """A matrix on the host is singular where its inverse is needed."""
