"""Derivatives of matrix functions, as rules that are linear in the tangents and differentiable themselves.

Every rule but that of QR divides by sums of singular values alone, never by their differences: it holds where
they coincide.  What it divides by is in one place, the solution of a Sylvester equation, whose derivative is the
solution of another: so all orders exist.
"""

from typing import Any

from orthlin import _backend as be
from orthlin._newton import newton_sign
from orthlin._scaling import frobenius

Array = Any
Arrays = be.Arrays
_NOISE = 8  # times n eps of the largest eigenvalue, what two rounded products leave of two that are zero


def sylvester(xp: Any, N: Array, F: Array, *, hermitian: bool = True) -> Array:
    """Solution Z of N Z + Z N = F, differentiable to all orders.

    A Hermitian N is positive semidefinite, and pairs of eigenvalues whose sum is rounding noise give zero.
    Otherwise the spectrum of N lies in the right half-plane: the sign of [[N, F], [0, -N]] is [[I, 2 Z], [0, -I]],
    and Newton's iteration for it is linear in F (Roberts 1980).
    """

    def function(N: Array, F: Array) -> Arrays:
        return (_by_eigenvalues(xp, N, F) if hermitian else newton_sign(xp, N, F)[1] / 2,)

    def rule(xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
        (N, _), (Z,), (dN, dF) = arrays, outputs, tangents
        return (sylvester(xp, N, dF - dN @ Z - Z @ dN, hermitian=hermitian),)

    def transposed(xp: Any, arrays: Arrays, outputs: Arrays, cotangents: Arrays) -> Arrays:
        (N, _), (Z,), (cZ,) = arrays, outputs, cotangents
        cF = sylvester(xp, be.adjoint(xp, N), cZ, hermitian=hermitian)
        Zh = be.adjoint(xp, Z)
        return -(cF @ Zh + Zh @ cF), cF

    return be.differentiable(xp, function, rule, N, F, adjoint=transposed, solves=lambda N, Z: N @ Z + Z @ N)[0]


def _by_eigenvalues(xp: Any, N: Array, F: Array) -> Array:
    s, V = be.eigh(xp, (N + be.adjoint(xp, N)) / 2)
    Vh = be.adjoint(xp, V)
    total = s[..., :, None] + s[..., None, :]
    large = total > _NOISE * N.shape[-1] * be.eps(xp, N) * s[..., None, -1:]
    inverse = xp.where(large, 1 / xp.where(large, total, 1), 0)
    return V @ (be.convert(xp, inverse, F.dtype) * (Vh @ F @ V)) @ Vh


def polar_rule(xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
    """Derivative of the polar factor U of A, m >= n or, through the adjoint, m < n.

    With H = U^H A: dU = U Z + (dA - U U^H dA) H^-1, where H Z + Z H = U^H dA - dA^H U.
    """
    (A,), (U,), (dA,) = arrays, outputs, tangents
    if A.shape[-2] < A.shape[-1]:
        A, U, dA = (be.adjoint(xp, x) for x in (A, U, dA))
        return (be.adjoint(xp, polar_rule(xp, (A,), (U,), (dA,))[0]),)
    Uh = be.adjoint(xp, U)
    H, B = Uh @ A, Uh @ dA
    dU = U @ sylvester(xp, H, B - be.adjoint(xp, B))
    if A.shape[-2] == A.shape[-1]:
        return (dU,)
    inverse = sylvester(xp, H, 2 * be.eye_like(xp, H, H.shape[-1]) + 0 * H)
    return (dU + (dA - U @ B) @ inverse,)


polar_adjoint = polar_rule  # U is the gradient of the nuclear norm


def sign_rule(xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
    """Derivative of the sign S of a square matrix A: N dS + dS N = dA - S dA S with N = S A."""
    (A,), (S,), (dA,) = arrays, outputs, tangents
    return (sylvester(xp, S @ A, dA - S @ dA @ S, hermitian=False),)


def sign_adjoint(xp: Any, arrays: Arrays, outputs: Arrays, cotangents: Arrays) -> Arrays:
    """Adjoint of `sign_rule`, which is the same with A^H and S^H."""
    A, S = (be.adjoint(xp, x) for x in (*arrays, *outputs))
    return sign_rule(xp, (A,), (S,), cotangents)


def qr_rule(xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
    """Derivative of the factors of A = Q R, R with a real diagonal; for m < n that of the leading block, and the rest.

    With X = Q^H dA R^-1 and the skew-Hermitian Omega whose strict lower triangle is that of X, and whose diagonal is
    its imaginary part: dQ = (I - Q Q^H) dA R^-1 + Q Omega, dR = Q^H dA - Omega R.
    """
    _, (Q, R), (dA,) = arrays, outputs, tangents
    k = Q.shape[-1]

    def leading(x: Array) -> Array:  # torch has no batched tangent of a slice that is everything
        return x[..., :k] if x.shape[-1] > k else x

    inverse = _inverse_upper(xp, leading(R))
    B = be.adjoint(xp, Q) @ dA
    X = leading(B) @ inverse
    lower = xp.tril(X, k=-1)
    Omega = lower - be.adjoint(xp, lower)
    if be.is_complex(xp, X):
        diagonal = X * be.eye_like(xp, X, k)
        Omega = Omega + (diagonal - xp.conj(diagonal)) / 2
    dQ = Q @ Omega
    if Q.shape[-2] > k:
        dQ = dQ + (leading(dA) - Q @ leading(B)) @ inverse
    return dQ, B - Omega @ R


def basis_rule(xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
    """Derivative of the factor Q of Y = Q R."""
    (Y,), (Q,) = arrays, outputs
    return qr_rule(xp, arrays, (Q, be.adjoint(xp, Q) @ Y), tangents)[:1]


def _inverse_upper(xp: Any, R: Array) -> Array:
    """Inverse of an upper triangular matrix, without the rows and columns whose diagonal entry is rounding noise."""
    n = R.shape[-1]
    eye = be.eye_like(xp, R, n)
    size = xp.abs(xp.sum(R * eye, axis=-1, keepdims=True))
    dead = be.convert(xp, size <= n * be.eps(xp, R) * xp.max(size, axis=-2, keepdims=True), R.dtype)
    alive = (1 - dead) * (1 - dead.mT)
    inverse = be.inv_lower(xp, be.adjoint(xp, R * alive + dead * eye))
    return alive * be.adjoint(xp, inverse)


def dense_rule(r: int, xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
    """Derivative of O = Q W, W the polar factor of the r leading singular directions of C."""
    (Q, C), (O,), (dQ, dC) = ([be.working(xp, x) for x in part] for part in (arrays, outputs, tangents))
    W = be.adjoint(xp, Q) @ O
    dO = dQ @ W + Q @ _truncated_tangent(xp, C, W, dC, r)
    return (be.convert(xp, dO, outputs[0].dtype),)


def factors_rule(r: int, xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
    """Derivative of Q V and V^H W, W as in `dense_rule`, V the leading left singular directions, with V^H dV = 0."""
    (Q, C), (B, W), (dQ, dC) = ([be.working(xp, x) for x in part] for part in (arrays, outputs, tangents))
    if r == C.shape[-2]:
        dB, dW = dQ, _truncated_tangent(xp, C, W, dC, r)
    else:
        V = be.adjoint(xp, Q) @ B
        dW = _truncated_tangent(xp, C, V @ W, dC, r)
        # V V^H V W = V W, so the part of dW outside the range of V is dV W
        Vh, Wh = be.adjoint(xp, V), be.adjoint(xp, W)
        outside = dW @ Wh
        dB, dW = dQ @ V + Q @ (outside - V @ (Vh @ outside)), Vh @ dW
    return be.convert(xp, dB, outputs[0].dtype), be.convert(xp, dW, outputs[1].dtype)


def _truncated_tangent(xp: Any, C: Array, W: Array, dC: Array, r: int) -> Array:
    """Derivative of the partial isometry W with C = H W + the dropped directions, H = W C^H of rank r.

    With the projector P = W W^H, P dW = Z W + H^+ (dP C + dC) (I - W^H W) and (I - P) dW = dP W, where
    H Z + Z H = P (dC W^H - W dC^H) P.
    """
    if r == C.shape[-2]:
        return polar_rule(xp, (C,), (W,), (dC,))[0]
    Wh = be.adjoint(xp, W)
    P, dP = (be.convert(xp, x, C.dtype) for x in _projector_tangent(xp, C, dC, r))
    H, B = W @ be.adjoint(xp, C), dC @ Wh
    # any positive number in place of the zeros, which would be divided by as rounding noise
    H = H + be.convert(xp, be.constant(frobenius(xp, H)), H.dtype) * (be.eye_like(xp, H, H.shape[-1]) - P)
    Z = sylvester(xp, H, P @ (B - be.adjoint(xp, B)) @ P)
    rest = dP @ C + dC
    return Z @ W + sylvester(xp, H, 2 * P) @ (rest - (rest @ Wh) @ W) + dP @ W


def _projector_tangent(xp: Any, C: Array, dC: Array, r: int) -> Arrays:
    """Projector on the r leading left singular directions of C, and its derivative."""
    wide = be.wide_dtype(xp, C) or C.dtype  # squares of singular values take twice the digits
    C, dC = be.convert(xp, C, wide), be.convert(xp, dC, wide)

    def function(S: Array) -> Arrays:
        V = be.eigh(xp, S)[1][..., -r:]
        return (V @ be.adjoint(xp, V),)

    def rule(xp: Any, arrays: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
        (S,), (P,), (dS,) = arrays, outputs, tangents
        s = be.eigh(xp, be.constant(S))[0][..., None, :]
        eye = be.eye_like(xp, S, S.shape[-1])
        E = 2 * P - eye  # the sign of S shifted by any number in the gap
        shift = be.convert(xp, (s[..., -r:][..., :1] + s[..., :-r][..., -1:]) / 2, S.dtype)
        return (sylvester(xp, E @ (S - shift * eye), dS - E @ dS @ E) / 2,)

    S, dS = C @ be.adjoint(xp, C), dC @ be.adjoint(xp, C)
    (P,) = be.differentiable(xp, function, rule, S, adjoint=rule)
    return P, rule(xp, (S,), (P,), (dS + be.adjoint(xp, dS),))[0]
