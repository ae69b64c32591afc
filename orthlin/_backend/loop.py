"""Steps of one kind, repeated: a loop of Python, or one of JAX, which traces and compiles its body once."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from orthlin._backend.arrays import is_host, library

State = tuple[Any, ...]
Row = tuple[float, ...]
Body = Callable[..., State]
_LOOP_FROM = 4  # steps; fewer are no more operations than a loop, and can be cut short at both ends


def repeat(
    xp: Any, body: Body, state: State, rows: Sequence[Row], stop: Callable[[Any, State], bool] | None = None
) -> State:
    """State after `body(xp, state, row, first=, last=)` for one row of coefficients after the other.

    At the first and the last step the body may leave out what does not change what is asked for.  On the host the
    repetition ends as soon as `stop(xp, state)`.

    On JAX rows of one length are one loop, which has derivatives in both modes.  So that what is compiled for eager
    arrays is found again, the body stands at the top of its module: a closure would be compiled at every call.
    """
    if library(state[0]) == "jax":
        return _on_jax(xp, body, state, rows)
    looking = stop is not None and is_host(state[0])
    for i, row in enumerate(rows):
        state = body(xp, state, row, first=i == 0, last=i + 1 == len(rows))
        if looking and stop(xp, state):  # type: ignore[misc]
            break
    return state


def _on_jax(xp: Any, body: Body, state: State, rows: Sequence[Row]) -> State:
    from jax.lax import scan

    lead = xp.broadcast_shapes(*(x.shape[:-2] for x in state if x is not None))
    state = tuple(x if x is None else xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in state)
    done = 0
    for run in (list(run) for _, run in groupby(rows, len)):
        if len(run) >= _LOOP_FROM:
            same = run[0] if len(set(run)) == 1 else None
            real = xp.finfo(state[0].dtype).dtype
            varied = None if same is not None else tuple(np.asarray(column, real) for column in zip(*run, strict=True))
            state, _ = scan(_step(xp, body, same), state, varied, len(run))
        else:
            for i, row in enumerate(run, done):
                state = body(xp, state, row, first=i == 0, last=i + 1 == len(rows))
        done += len(run)
    return state


@cache
def _step(xp: Any, body: Body, same: Row | None) -> Callable[[State, Any], tuple[State, None]]:
    """A step for `scan`, with its coefficients where those of all steps are the same."""
    return lambda state, row: (body(xp, state, row if same is None else same, first=False, last=False), None)
