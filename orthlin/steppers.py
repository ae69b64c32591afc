r"""Optimizers as pure functions on arrays: matrix-sign gradient descent and Muon, full or at low rank.

A :class:`Stepper` is two functions: ``init(X)`` makes the state of an X of shape (..., m, n), ``update(G, state, X)``
takes a gradient and returns what to add to X and the next state, which goes on bit for bit.  Nothing is written to.

With M a momentum, r a rank and k = min(m, n), the step of a matrix is

.. math:: \Delta = -\eta\, s\, O - \eta \lambda X, \qquad
    O = Q\,\mathrm{msign}(B) + \alpha \sqrt{\frac{k - r}{n}}\, T D^{-1}, \qquad B = Q^H M, \quad T = M - Q B,

with learning rate :math:`\eta`, scaling s, weight decay :math:`\lambda`, an orthonormal basis Q of a sketch of M,
the lengths D of the columns of the tail T, and its weight :math:`\alpha`, zero in the paper.  No product is added:
:math:`\|t_j\|^2 = \|m_j\|^2 - \|b_j\|^2`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin._direction import Direction, Recipe, faded, real_product, tail_weight
from orthlin.errors import NonFiniteError, OptionError
from orthlin.schedules import Schedule

Array = Any

__all__ = ["State", "Stepper", "msgd", "muon", "tail_weight"]


class State(NamedTuple):
    """What a stepper remembers of one parameter (a stack of matrices of shape (..., m, n)).

    Attributes
    ----------
    step : int, or array of int32 for JAX
        Updates so far, skipped ones included.
    momentum, right : array, shapes (..., m, n) and (..., r, n), or None
        Momentum, in float32 at least, and the right factor that the next sketch starts from.
    skipped : array of int32, shape (..., 1, 1)
        Updates left out because a gradient was not finite.
    fading : array of float32, shape (..., 1, 1), or None
        Share of a full step that is gone: beta^j in the j-th update in a row whose gradient is zero; for a momentum.
    """

    step: Any
    momentum: Array | None
    right: Array | None
    skipped: Array
    fading: Array | None = None


class Stepper(NamedTuple):
    """An optimizer.

    Attributes
    ----------
    init : callable
        ``init(X, name="")`` returns the State of parameter X.  The name takes part in the random numbers.
    update : callable
        ``update(G, state, X, name="")`` returns (delta, state); the new parameter is ``X + delta``.
    """

    init: Callable[..., State]
    update: Callable[..., tuple[Array, State]]


class _Rule(NamedTuple):
    """What Muon does around the direction."""

    recipe: Recipe
    lr: Any
    momentum: Any
    nesterov: bool
    weight_decay: Any
    cautious: bool
    error_feedback: bool
    nonfinite: str


def muon(
    lr: float | Array | Callable[[Any], Any],
    *,
    rank: int | float | Callable[[Any], int | float] | None = None,
    momentum: float | Array = 0.95,
    nesterov: bool = True,
    weight_decay: float | Array = 0.0,
    cautious: bool = False,
    scale: str = "none",
    n_iter: int = 0,
    sketch: str = "gaussian",
    warm_start: bool = False,
    error_feedback: bool = False,
    tail: float | str = 0.0,
    tol: float | None = None,
    precision: str = "highest",
    schedule: Schedule | None = None,
    nonfinite: str = "skip",
    seed: int = 0,
) -> Stepper:
    r"""Muon: steps along the orthogonalized momentum, in full or at low rank.

    Parameters
    ----------
    lr : float, array or callable
        Learning rate, or a function of the step (from 0) that gives it.  An array, of shape (), is looked at on the
        host only: it may be traced.
    rank : int, float, callable or None
        Rank of the direction: a number, a fraction of min(m, n), or a function of the step that gives either;
        at most min(m, n).  None, and ranks that reach min(m, n), orthogonalize in full.
    momentum : float or array
        :math:`\beta` < 1 of the average :math:`M \leftarrow \beta M + (1 - \beta) G`, as in torch.optim.Muon and optax.
    nesterov : bool
        Orthogonalize :math:`\beta M + (1 - \beta) G` in place of M.
    weight_decay : float or array
        Decoupled: X shrinks by the factor 1 - lr * weight_decay.
    cautious : bool
        Decay only the entries that the step moves towards zero as well.
    scale : {"none", "spectral", "rms", "rms_rank", "nuclear"}
        s = 1; sqrt(max(1, m/n)); 0.2 sqrt(max(m, n)), which gives a full direction the root mean square 0.2 of a
        step of AdamW; the same for the Frobenius norm that the direction has at its rank; or <M, O>, with which
        a constant learning rate converges.
    n_iter, sketch
        As in :func:`orthlin.lowrank_orth`.
    warm_start : bool
        Sketch with the right factor of the last step, worth a power iteration at no cost, instead of
        fresh random numbers.
    error_feedback : bool
        Take only the part :math:`(1 - \beta) Q B` off the momentum M + (1 - beta) G instead of all of it, so
        that what was left out stays; in place of `nesterov`.
    tail : float or "auto"
        :math:`\alpha`; "auto" is :math:`\sqrt{8 r / k}`.  With alpha = 1 the direction has the Frobenius norm of a full
        one, sqrt(k).
    tol, precision
        Of a low-rank direction, as in :func:`orthlin.lowrank_orth`; the precision is that of a schedule's products too.
    schedule : Schedule, optional
        How a full direction is orthogonalized; to working precision if it is not given.
    nonfinite : {"skip", "raise"}
        A matrix whose gradient holds NaN or infinity keeps its values and its state, and counts it; or, on
        the host, is an error.
    seed : int
        Random numbers are a function of seed, name and step.

    Returns
    -------
    Stepper
        Functions `init` and `update`, which work on every array library and under ``jax.jit`` (rank functions
        need the step as an int there).

    Raises
    ------
    OptionError, RankError
        If an argument is not as described.

    Notes
    -----
    Cost of a low-rank direction: 6 m n r flops, with or without a tail, and O((m + n) r^2).  An update moves 7 m n
    numbers at least, 3 m n for the direction; being pure, on devices 44 m n, `msgd` 23 m n, in full 148 m n.

    References
    ----------
    He, Deng and Lu, arXiv 2509.11983 (low rank).  Ahn et al., Dion, arXiv 2504.05295 (error feedback, warm
    start).  Lau, Long and Su, PolarGrad, arXiv 2505.21799 (nuclear scaling).

    Examples
    --------
    >>> import numpy as np
    >>> from orthlin import steppers
    >>> A = np.random.default_rng(0).standard_normal((30, 20))
    >>> X = np.zeros_like(A)  # minimize ||X - A||^2 / 2
    >>> stepper = steppers.muon(lambda t: 0.3 * 0.97**t, rank=5, warm_start=True, tail="auto")
    >>> state = stepper.init(X)
    >>> for _ in range(150):
    ...     delta, state = stepper.update(X - A, state, X)
    ...     X = X + delta
    >>> bool(np.linalg.norm(X - A) < 0.1 * np.linalg.norm(A))
    True
    """
    lr = lr if callable(lr) else check.hyperparameter(lr, "lr")
    momentum = check.hyperparameter(momentum, "momentum", below=1)
    weight_decay = check.hyperparameter(weight_decay, "weight_decay")
    check.option(nonfinite, "nonfinite", ("skip", "raise"))
    for name, value in {"nesterov": nesterov, "cautious": cautious, "error_feedback": error_feedback}.items():
        check.flag(value, name)
    how: dict[str, Any] = {"n_iter": n_iter, "sketch": sketch, "warm_start": warm_start, "tail": tail, "tol": tol}
    recipe = Recipe(rank=rank, precision=precision, scale=scale, schedule=schedule, seed=seed, **how)
    return _stepper(_Rule(recipe, lr, momentum, nesterov, weight_decay, cautious, error_feedback, nonfinite))


def msgd(
    lr: float | Array | Callable[[Any], Any],
    *,
    rank: int | float | Callable[[Any], int | float] | None = None,
    weight_decay: float | Array = 0.0,
    scale: str = "none",
    n_iter: int = 0,
    sketch: str = "gaussian",
    warm_start: bool = False,
    tail: float | str = 0.0,
    tol: float | None = None,
    precision: str = "highest",
    schedule: Schedule | None = None,
    nonfinite: str = "skip",
    seed: int = 0,
) -> Stepper:
    r"""Matrix-sign gradient descent: :func:`muon` without momentum.

    With :math:`\|\nabla f(X) - \nabla f(Y)\|_* \le L \|X - Y\|_2` a step of length :math:`\eta` along any low-rank
    direction gives :math:`f(X + \Delta) \le f(X) - \eta \|Q^H G\|_* + L \eta^2 / 2`: a constant one stalls at a
    distance of its own size, `scale` "nuclear" with lr = 1/L does not.

    Parameters
    ----------
    lr, rank, weight_decay, scale, n_iter, sketch, warm_start, tail, tol, precision, schedule, nonfinite, seed
        See :func:`muon`.

    Returns
    -------
    Stepper
        Functions `init` and `update`.

    Raises
    ------
    OptionError, RankError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np
    >>> from orthlin import steppers
    >>> A = np.random.default_rng(0).standard_normal((30, 20))
    >>> X = np.zeros_like(A)  # L = 20 for ||X - A||_F^2 / 2
    >>> stepper = steppers.msgd(1 / 20, rank=5, scale="nuclear")
    >>> state = stepper.init(X)
    >>> for _ in range(500):
    ...     delta, state = stepper.update(X - A, state, X)
    ...     X = X + delta
    >>> bool(np.linalg.norm(X - A) < 1e-6)
    True
    """
    rest: dict[str, Any] = {"rank": rank, "n_iter": n_iter, "sketch": sketch, "warm_start": warm_start, "tail": tail}
    rest |= {"scale": scale, "tol": tol, "precision": precision, "schedule": schedule, "nonfinite": nonfinite}
    return muon(lr, momentum=0.0, nesterov=False, weight_decay=weight_decay, seed=seed, **rest)


def _stepper(rule: _Rule) -> Stepper:
    remembers = rule.error_feedback or not isinstance(rule.momentum, float) or rule.momentum > 0  # arrays unread

    def init(X: Array, name: str = "") -> State:
        X = be.filled(X)
        xp = check.matrix(X, "X")
        with be.settings(X):
            momentum = be.working(xp, xp.zeros_like(X)) if remembers else None
            right = rule.recipe.first_right(xp, be.working(xp, X), name)
            skipped = xp.zeros((*X.shape[:-2], 1, 1), dtype=xp.int32, device=be.device(X))
            fading = xp.astype(skipped + 1, xp.float32) if remembers else None
            return State(be.counter(xp, X), momentum, right, skipped, fading)

    @be.own_settings
    def update(G: Array, state: State, X: Array, name: str = "") -> tuple[Array, State]:
        xp = check.matrix(G, "G")
        check.twin(xp, G, "G", X, "X")
        if not isinstance(state, State) or remembers == (state.momentum is None):
            raise OptionError(f"state: expected one with{'out' * (not remembers)} momentum, got {type(state).__name__}")
        if remembers:
            check.twin(xp, G, "G", state.momentum, "state.momentum")
        G = be.convert(xp, G, be.working(xp, X).dtype)
        beta = be.factor(xp, rule.momentum, G)
        M, U = _momentum(rule, beta, state.momentum, G)
        d = rule.recipe.direction(xp, U, state.right, state.step, name)
        if rule.nonfinite == "raise" and be.is_host(G) and not bool(xp.all(d.finite)):
            raise NonFiniteError("G: holds NaN or infinity; remove or replace them first")
        if rule.error_feedback:
            M = U - (1 - beta) * (U if d.Q is None else d.Q @ d.captured(xp))
        fading = None if (f := state.fading) is None else faded(xp, f, be.nonzero(xp, G), rule.momentum, d.finite)
        delta = _delta(xp, rule, d, state.step, be.working(xp, X), fading)
        M = None if M is None else xp.where(d.finite, M, state.momentum)
        after = State(state.step + 1, M, d.right, state.skipped + xp.astype(~d.finite, xp.int32), fading)
        return be.convert(xp, delta, X.dtype), after

    return Stepper(init, update)


def _momentum(rule: _Rule, beta: Any, M: Array | None, G: Array) -> tuple[Array | None, Array]:
    """Next momentum, and what is orthogonalized."""
    if M is None:
        return None, G
    if rule.error_feedback:
        return M, M + (1 - beta) * G  # what it leaves is known once the direction is
    new = beta * M + (1 - beta) * G
    return new, beta * new + (1 - beta) * G if rule.nesterov else new


def _delta(xp: Any, rule: _Rule, d: Direction, step: Any, X: Array, fading: Array | None) -> Array:
    """Return -lr (s O + weight_decay X), zero where the direction is not finite."""
    lr = be.factor(xp, rule.lr(step) if callable(rule.lr) else rule.lr, X)
    decay, O = be.factor(xp, rule.weight_decay, X), d.dense()
    O = O if fading is None else be.convert(xp, fading, O.dtype) * O
    decayed = xp.where(real_product(xp, O, X) > 0, X, xp.zeros_like(X)) if rule.cautious else X
    return xp.where(d.finite, -lr * (d.length * O + decay * decayed), xp.zeros_like(X))
