"""Eigenvalue dynamics of non-contrastive learning in the linear toy model (2212.04858, Sections 3 and 4).

The model is ``z = W x`` with ``x ~ N(0, I)``, two views ``x + σ ξ``, and the closed-form predictor ``W_P = (W Wᵀ)^α``,
which is constant in the gradient. Plain gradient descent minimises ``½‖p − z'‖²`` (Euclidean) or ``−cos(p, z')``
(cosine) in one direction. λ are the eigenvalues of ``W Wᵀ``, ``d = λ^α`` those of ``W_P``, and ``c = 1 + σ²``. Time is
learning rate times steps. The losses in this package have two directions and a factor of two in each; their dynamics
are four times as fast.

The functions have an argument ``rule``:

``"direct"``            gradient through the predictor (DirectPred, DirectCopy).
``"iso"``               gradient of the prediction, applied to z (IsoLoss, IsoCopy).
``"no_stop_gradient"``  the target is differentiated as well: collapse.
``"no_predictor"``      W_P = I.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Rule = Literal["direct", "iso", "no_stop_gradient", "no_predictor"]


def predictor_spectrum(
    eigenvalues: Float[ndarray, " M"], *, alpha: float = 1.0, eps: float = 0.0, normalize: bool = False
) -> Float[ndarray, " M"]:
    """Compute the eigenvalues d of the predictor: ``(λ + ε)^α``, or ``(λ/λmax + ε)^α``.

    Example:
        >>> predictor_spectrum(np.array([1.0, 4.0]), alpha=0.5, normalize=True)
        array([0.5, 1. ])
    """
    scale = eigenvalues.max() if normalize else 1.0
    return (eigenvalues / scale + eps) ** alpha


def euclidean_rate(
    eigenvalues: Float[ndarray, " M"],
    *,
    rule: Rule = "direct",
    alpha: float = 1.0,
    noise: float = 0.0,
    target_noise: float | None = None,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    normalize: bool = False,
) -> Float[ndarray, " M"]:
    """Compute dλ/dt for the Euclidean metric, where the modes are independent.

    direct ``2 λ d (1 − c d)``, iso ``2 λ (1 − c d)``, no_predictor ``2 λ (1 − c)``,
    no_stop_gradient ``−2 λ (c d² − 2 d + c')``; weight decay adds ``−2 γ λ``.

    Args:
        eigenvalues: λ > 0.
        rule: see the module.
        alpha: α ≥ 0, power of the predictor.
        noise: σ ≥ 0 of the input view of the predictor (c = 1 + σ²).
        target_noise: σ' of the target view (c' = 1 + σ'²); None means σ.
        weight_decay: γ ≥ 0.
        eps: ε ≥ 0, inside the power.
        normalize: divide the spectrum by its largest value.

    Raises:
        KeyError: an unknown rule.

    Example:
        >>> euclidean_rate(np.array([0.25, 1.0]), rule="iso")
        array([0.375, 0.   ])
    """
    c = 1 + noise**2
    c_target = c if target_noise is None else 1 + target_noise**2
    d = predictor_spectrum(eigenvalues, alpha=alpha, eps=eps, normalize=normalize)
    relative: dict[Rule, Float[ndarray, " M"]] = {
        "direct": d * (1 - c * d),
        "iso": 1 - c * d,
        "no_stop_gradient": -(c * d**2 - 2 * d + c_target),
        "no_predictor": np.full_like(d, 1 - c),
    }
    return 2 * eigenvalues * (relative[rule] - weight_decay)


def cosine_rate(
    eigenvalues: Float[ndarray, " M"], squares: Float[ndarray, "N M"], *, rule: Rule = "direct", alpha: float = 1.0
) -> Float[ndarray, " M"]:
    """Compute dλ/dt for the cosine metric and σ → 0, with the expectation over a given sample. The modes are coupled.

    With ``z_m² = λ_m x_m²``, ``D = diag(d)`` and ``S = Σ_k d_k z_k²``:

    direct ``2 E[z_m² d_m Σ_k d_k (d_k − d_m) z_k² / (‖Dz‖³ ‖z‖)]``; iso: without the factor d_m;
    no_predictor: 0;
    no_stop_gradient ``2 E[z_m² (2 d_m / (‖Dz‖ ‖z‖) − d_m² S / (‖Dz‖³ ‖z‖) − S / (‖Dz‖ ‖z‖³))]``.

    direct and no_stop_gradient conserve Σ λ, iso conserves Σ λ^(1+α).

    Args:
        eigenvalues: λ > 0.
        squares: sample of x², one row per draw.
        rule: see the module.
        alpha: α ≥ 0, power of the predictor.

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> cosine_rate(np.array([1.0, 4.0]), np.ones((1, 2)), rule="iso").round(4)
        array([ 0.0819, -0.0205])
    """
    z2 = squares * eigenvalues
    d = predictor_spectrum(eigenvalues, alpha=alpha)
    norm_z, norm_p = np.sqrt(z2.sum(1)), np.sqrt((z2 * d**2).sum(1))
    overlap = (z2 * d).sum(1)
    if rule == "no_predictor":
        return np.zeros_like(eigenvalues)
    if rule == "no_stop_gradient":
        towards = 2 * np.outer(1 / (norm_p * norm_z), d)
        away = np.outer(overlap / (norm_p**3 * norm_z), d**2) + (overlap / (norm_p * norm_z**3))[:, None]
        return 2 * (z2 * (towards - away)).mean(0)
    if rule not in ("direct", "iso"):
        raise ValueError(f"rule must be direct, iso, no_stop_gradient or no_predictor, got {rule!r}")
    # Σ_k d_k (d_k − d_m) z_k² for all m at once
    gap = (norm_p**2)[:, None] - np.outer(overlap, d)
    rate = 2 * (z2 * gap / (norm_p**3 * norm_z)[:, None]).mean(0)
    return rate * d if rule == "direct" else rate


def integrate(
    rate: Callable[[Float[ndarray, " M"]], Float[ndarray, " M"]],
    start: Float[ndarray, " M"],
    *,
    step: float,
    steps: int,
) -> Float[ndarray, "T M"]:
    """Integrate with Euler's method and return the trajectory of ``steps + 1`` points, including the start.

    Args:
        rate: function from λ to dλ/dt, such as :func:`euclidean_rate` with fixed arguments.
        start: λ at time 0.
        step: time per step (learning rate), > 0.
        steps: number of steps, ≥ 0.

    Example:
        >>> integrate(lambda x: -x, np.array([1.0]), step=0.5, steps=2)[:, 0]
        array([1.  , 0.5 , 0.25])
    """
    points = [np.asarray(start, dtype=float)]
    for _ in range(steps):
        points.append(points[-1] + step * rate(points[-1]))
    return np.stack(points)


def gram_eigenvalues(weight: Float[ndarray, "M K"]) -> Float[ndarray, " M"]:
    """Compute the eigenvalues λ of ``W Wᵀ``, ascending.

    Example:
        >>> gram_eigenvalues(np.array([[2.0, 0.0], [0.0, 1.0]]))
        array([1., 4.])
    """
    return np.linalg.eigvalsh(weight @ weight.T)


def euclidean_matrix_step(
    weight: Float[ndarray, "M K"],
    *,
    step: float,
    rule: Rule = "direct",
    alpha: float = 1.0,
    noise: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    normalize: bool = False,
) -> Float[ndarray, "M K"]:
    """Make one step of gradient descent on W, with the Euclidean metric and the exact expectation over the data.

    With ``A = c W_P W − W``: direct ``W − η W_P A``, iso ``W − η A``, no_predictor ``W − η (c − 1) W``,
    no_stop_gradient ``W − η (W_P A − (W_P W − c W))``; weight decay adds ``− η γ W``.

    Args:
        weight: W.
        step: η > 0, the learning rate.
        rule, alpha, noise, weight_decay, eps, normalize: as in euclidean_rate.

    Raises:
        KeyError: an unknown rule.

    Example:
        >>> euclidean_matrix_step(np.diag([1.0, 0.5]), step=0.1, rule="iso").diagonal()
        array([1.    , 0.5375])
    """
    c = 1 + noise**2
    values, vectors = np.linalg.eigh(weight @ weight.T)
    d = predictor_spectrum(values.clip(min=0), alpha=alpha, eps=eps, normalize=normalize)
    predicted = (vectors * d) @ (vectors.T @ weight)
    residual = c * predicted - weight
    through = (vectors * d) @ (vectors.T @ residual)
    gradient: dict[Rule, Float[ndarray, "M K"]] = {
        "direct": through,
        "iso": residual,
        "no_stop_gradient": through - (predicted - c * weight),
        "no_predictor": (c - 1) * weight,
    }
    return weight - step * (gradient[rule] + weight_decay * weight)


def cosine_matrix_step(
    weight: Float[ndarray, "M K"],
    first: Float[ndarray, "N K"],
    second: Float[ndarray, "N K"],
    *,
    step: float,
    rule: Rule = "direct",
    alpha: float = 1.0,
) -> Float[ndarray, "M K"]:
    """Make one step of gradient descent on W, with the cosine metric and a sample of two views.

    The loss is ``−mean cos(p, z')`` with ``p = W_P W x_1`` (no_predictor: ``W x_1``) and ``z' = W x_2``. Its gradient
    with respect to p is ``(cos(p, z') p/‖p‖ − z'/‖z'‖) / ‖p‖``. The gradient with respect to z' has p and z' exchanged
    and is used by no_stop_gradient only.

    Args:
        weight: W.
        first: x_1, the input view of the predictor.
        second: x_2, the target view.
        step: η > 0, the learning rate.
        rule, alpha: as in cosine_rate.

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> x = np.array([[1.0, 1.0], [1.0, -1.0]])
        >>> cosine_matrix_step(np.diag([1.0, 2.0]), x, x, step=0.1, rule="iso").diagonal().round(4)
        array([1.0041, 1.9995])
    """
    if rule not in ("direct", "iso", "no_stop_gradient", "no_predictor"):
        raise ValueError(f"rule must be direct, iso, no_stop_gradient or no_predictor, got {rule!r}")
    z, target = first @ weight.T, second @ weight.T
    predictor = np.eye(len(weight))
    if rule != "no_predictor":
        values, vectors = np.linalg.eigh(weight @ weight.T)
        predictor = (vectors * predictor_spectrum(values.clip(min=0), alpha=alpha)) @ vectors.T
    p = z @ predictor
    norm_p, norm_t = (np.linalg.norm(v, axis=1, keepdims=True) for v in (p, target))
    p_hat, t_hat = p / norm_p, target / norm_t
    cosine = (p_hat * t_hat).sum(1, keepdims=True)
    by_p = (cosine * p_hat - t_hat) / norm_p
    gradient = (by_p if rule == "iso" else by_p @ predictor).T @ first
    if rule == "no_stop_gradient":
        gradient = gradient + ((cosine * t_hat - p_hat) / norm_t).T @ second
    return weight - step * gradient / len(first)


def iso_solution(
    time: float | Float[ndarray, " T"],
    start: float,
    *,
    alpha: float = 1.0,
    noise: float = 0.0,
    weight_decay: float = 0.0,
) -> Float[ndarray, " T"]:
    """Compute λ(t) of the Euclidean iso rule in closed form: ``u = λ^α`` is logistic.

    ``u(t) = u* / (1 + (u*/u_0 − 1) exp(−2 α (1 − γ) t))`` with ``u* = (1 − γ) / c``. All small modes grow at the same
    rate.

    Args:
        time: t ≥ 0, learning rate × steps.
        start: λ at time 0, > 0.
        alpha: α > 0.
        noise: σ ≥ 0.
        weight_decay: γ in [0, 1).

    Example:
        >>> iso_solution(np.array([0.0, 100.0]), 0.5)
        array([0.5, 1. ])
    """
    time = np.asarray(time, dtype=float)
    fixed = (1 - weight_decay) / (1 + noise**2)
    u = fixed / (1 + (fixed / start**alpha - 1) * np.exp(-2 * alpha * (1 - weight_decay) * time))
    return u ** (1 / alpha)


def direct_time(eigenvalue: float | Float[ndarray, " T"], start: float, *, noise: float = 0.0) -> Float[ndarray, " T"]:
    """Compute the time at which an eigenvalue is reached by the Euclidean direct rule with α = 1.

    ``t = ½ [c ln(λ (1 − c λ_0) / (λ_0 (1 − c λ))) − 1/λ + 1/λ_0]``. A small mode needs a time of about 1/(2 λ_0).

    Args:
        eigenvalue: λ reached, on the same side of 1/c as the start.
        start: λ_0 > 0.
        noise: σ ≥ 0.

    Example:
        >>> direct_time(np.array([0.5]), 0.01).round(2)
        array([51.3])
    """
    c = 1 + noise**2
    eigenvalue = np.asarray(eigenvalue, dtype=float)
    odds = eigenvalue * (1 - c * start) / (start * (1 - c * eigenvalue))
    return (c * np.log(odds) - 1 / eigenvalue + 1 / start) / 2


def fixed_points(
    *,
    rule: Literal["direct", "iso"] = "direct",
    alpha: float = 1.0,
    noise: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[float, float]:
    """Return threshold and attractor for the Euclidean metric.

    Modes that start below the threshold decay to 0; the others converge to the attractor. iso:
    ``(0, ((1 − γ)/c)^(1/α))``. direct: the roots ``d = (1 ∓ √(1 − 4 c γ)) / (2 c)``, as ``λ = d^(1/α)``. If every mode
    decays (direct with γ > 1/(4c), iso with γ ≥ 1): ``(inf, 0)``.

    Args:
        rule: ``"direct"`` or ``"iso"``.
        alpha: α > 0.
        noise: σ ≥ 0.
        weight_decay: γ ≥ 0.

    Example:
        >>> [round(point, 4) for point in fixed_points(noise=0.1, weight_decay=0.1)]
        [0.1129, 0.8772]
    """
    c = 1 + noise**2
    if rule == "iso" and weight_decay < 1:
        return 0.0, ((1 - weight_decay) / c) ** (1 / alpha)
    if rule == "direct" and 4 * c * weight_decay <= 1:
        root = (1 - 4 * c * weight_decay) ** 0.5
        return ((1 - root) / (2 * c)) ** (1 / alpha), ((1 + root) / (2 * c)) ** (1 / alpha)
    return float("inf"), 0.0


def participation_ratio(eigenvalues: Float[ndarray, "... M"]) -> Float[ndarray, "..."]:
    """Compute the participation ratio ``(Σ λ)² / Σ λ²``, an effective number of eigenvalues from 1 to M.

    Example:
        >>> float(participation_ratio(np.array([1.0, 1.0, 0.0])))
        2.0
    """
    return eigenvalues.sum(-1) ** 2 / (eigenvalues**2).sum(-1)
