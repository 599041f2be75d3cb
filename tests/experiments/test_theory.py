"""The toy model's eigenvalue dynamics: published numbers, closed forms, autograd, and the end-to-end claim."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from plugins.experiments.theory import (
    cosine_matrix_step,
    cosine_rate,
    direct_time,
    euclidean_matrix_step,
    euclidean_rate,
    fixed_points,
    gram_eigenvalues,
    integrate,
    iso_solution,
    participation_ratio,
)
from plugins.predictors import ClosedFormPredictor

NOISE = 0.1  # c = 1.01
FIXED = 1 / 1.01


def toy_weight():
    torch.manual_seed(2)
    return (torch.randn(10, 15) / 4).double().numpy()


def toy_eigenvalues():
    return gram_eigenvalues(toy_weight())


def matrix_trajectory(steps, *, step=0.01, **options):
    """Eigenvalues after each of the steps, descended with the exact expectation."""
    weight = toy_weight()
    points = [gram_eigenvalues(weight)]
    for _ in range(steps):
        weight = euclidean_matrix_step(weight, step=step, **options)
        points.append(gram_eigenvalues(weight))
    return np.stack(points)


def scalar_trajectory(steps, *, step=0.01, **options):
    return integrate(lambda x: euclidean_rate(x, **options), toy_eigenvalues(), step=step, steps=steps)


def first_time_above(trajectory, start, level=0.5):
    """Steps until the mode that begins at ``start`` exceeds a level."""
    mode = np.abs(trajectory[0] - start).argmin()
    return int((trajectory[:, mode] > level).argmax())


def cosine_trajectory(steps, *, step, rule="direct", alpha=1.0):
    squares = np.random.default_rng(0).standard_normal((500, 10)) ** 2
    return integrate(
        lambda x: cosine_rate(x, squares, rule=rule, alpha=alpha), toy_eigenvalues(), step=step, steps=steps
    )


# The start ------------------------------------------------------------------------------------------------------------


def test_reference_spectrum():
    wanted = [0.0200, 0.0989, 0.1977, 0.3443, 0.5081, 0.5706, 1.0670, 1.1088, 1.7282, 2.2383]
    start = toy_eigenvalues()
    np.testing.assert_allclose(start, wanted, atol=6e-5)
    assert start.sum() == pytest.approx(7.8818, abs=1e-4)
    assert start.mean() == pytest.approx(0.78818, abs=1e-5)
    assert np.sqrt((start**2).mean()) == pytest.approx(1.05433, abs=1e-5)
    assert (start**1.5).mean() ** (2 / 3) == pytest.approx(0.93268, abs=1e-5)
    assert participation_ratio(start) == pytest.approx(5.589, abs=1e-3)


# P11: Euclidean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trajectory", [matrix_trajectory, scalar_trajectory])
def test_p11_direct_leaves_the_smallest_mode_behind(trajectory):
    path = trajectory(1499, noise=NOISE)
    assert 0.046 <= path[-1, 0] <= 0.050
    np.testing.assert_allclose(path[-1, 1:], FIXED, atol=2e-3)
    for start, steps in [(0.0989, 519), (0.1977, 225), (0.3443, 79)]:
        assert abs(first_time_above(path, start) - steps) <= 3
    assert path[:, 0].max() < 0.5


@pytest.mark.parametrize("trajectory", [matrix_trajectory, scalar_trajectory])
def test_p11_iso_brings_all_modes_to_one_scale(trajectory):
    path = trajectory(1499, noise=NOISE, rule="iso")
    np.testing.assert_allclose(path[-1], FIXED, atol=1e-4)
    assert np.ptp(path[-1]) < 1e-6
    assert path[500].min() >= 0.9879
    for start, steps in [(0.0200, 196), (0.0989, 112), (0.1977, 71), (0.3443, 33)]:
        assert abs(first_time_above(path, start) - steps) <= 3


def test_p11_collapse_without_stop_gradient():
    path = matrix_trajectory(1499, noise=NOISE, rule="no_stop_gradient")
    assert path[-1].max() < 1e-3
    assert path[-1].max() == pytest.approx(8e-5, rel=0.1)
    assert path[100].max() == pytest.approx(1.228, abs=1e-3)
    assert path[100].min() == pytest.approx(0.0027, abs=1e-4)
    assert path[500].max() == pytest.approx(0.966, abs=1e-3)


def test_p11_no_predictor_decays_alike():
    path = matrix_trajectory(1499, step=0.1, noise=NOISE, rule="no_predictor")
    np.testing.assert_allclose(path[-1] / path[0], np.exp(-0.02 * 149.9), rtol=0.02)


@pytest.mark.parametrize(("gamma", "survivor", "threshold"), [(0.1, 0.8772, 0.1129), (0.2, 0.7120, 0.2781)])
def test_p11_weight_decay_kills_small_modes_of_direct(gamma, survivor, threshold):
    assert fixed_points(noise=NOISE, weight_decay=gamma) == pytest.approx((threshold, survivor), abs=1e-4)
    path = scalar_trajectory(6000, noise=NOISE, weight_decay=gamma)
    alive = path[0] > threshold
    assert 0 < alive.sum() < 10
    np.testing.assert_allclose(path[-1, alive], survivor, atol=1e-3)
    assert path[-1, ~alive].max() < 1e-2


def test_p11_strong_weight_decay_kills_all_modes_of_direct():
    assert 0.3 > 1 / (4 * 1.01)
    assert fixed_points(noise=NOISE, weight_decay=0.3) == (float("inf"), 0.0)
    assert scalar_trajectory(6000, noise=NOISE, weight_decay=0.3)[-1].max() < 1e-3


@pytest.mark.parametrize(("gamma", "survivor"), [(0.1, 0.8911), (0.2, 0.7921), (0.3, 0.6931)])
def test_p11_weight_decay_kills_no_mode_of_iso(gamma, survivor):
    assert fixed_points(rule="iso", noise=NOISE, weight_decay=gamma) == pytest.approx((0.0, survivor), abs=1e-4)
    path = scalar_trajectory(6000, noise=NOISE, weight_decay=gamma, rule="iso")
    np.testing.assert_allclose(path[-1], survivor, atol=1e-3)


@pytest.mark.sample("iso-*")
@pytest.mark.parametrize(
    ("rule", "step", "deviation"),
    [
        ("direct", 0.01, 1.3e-2),
        ("iso", 0.01, 8e-3),
        ("no_stop_gradient", 0.01, 5.1e-2),
        ("no_predictor", 0.1, 2e-3),
    ],
)
def test_discrete_descent_follows_the_differential_equation(rule, step, deviation):
    """The deviation is relative to the largest λ. (Without stop-gradient a mode deviates by up to 0.13 of itself.)"""
    discrete = matrix_trajectory(1499, step=step, noise=NOISE, rule=rule)
    fine = integrate(lambda x: euclidean_rate(x, noise=NOISE, rule=rule), discrete[0], step=step / 20, steps=20 * 1499)
    error = np.abs(discrete - fine[::20]) / fine[::20].max(1, keepdims=True)
    assert deviation / 2 < error.max() < deviation


@pytest.mark.sample("1.0")
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_iso_closed_form(alpha):
    path = matrix_trajectory(5000, step=1e-3, noise=NOISE, alpha=alpha, rule="iso")
    wanted = np.stack([iso_solution(1e-3 * np.arange(5001), start, alpha=alpha, noise=NOISE) for start in path[0]], 1)
    np.testing.assert_allclose(path, wanted, rtol=2e-3)
    assert fixed_points(rule="iso", alpha=alpha, noise=NOISE)[1] == pytest.approx(1.01 ** (-1 / alpha))


@pytest.mark.parametrize(("alpha", "scale"), [(0.5, 0.98030), (2.0, 0.99504)])
def test_iso_scale_of_other_powers(alpha, scale):
    path = matrix_trajectory(3000, noise=NOISE, alpha=alpha, rule="iso")
    np.testing.assert_allclose(path[-1], scale, atol=2e-5)


@pytest.mark.slow
def test_direct_implicit_time_and_escape():
    start = 0.01
    path = integrate(lambda x: euclidean_rate(x, noise=NOISE), np.array([start]), step=1e-3, steps=60_000)[:, 0]
    times = direct_time(path[1:], start, noise=NOISE)
    np.testing.assert_allclose(times, 1e-3 * np.arange(1, 60_001), rtol=2e-3)
    assert direct_time(0.5, start, noise=NOISE) == pytest.approx(1 / (2 * start), rel=0.1)


def test_iso_grows_small_modes_at_one_rate_and_direct_does_not():
    """Initial dlnλ/dt at α = ½ of the four smallest modes."""
    start = toy_eigenvalues()[:4]
    iso = euclidean_rate(start, alpha=0.5, noise=NOISE, rule="iso") / start
    direct = euclidean_rate(start, alpha=0.5, noise=NOISE) / start
    np.testing.assert_allclose(iso, [1.68, 1.32, 1.05, 0.77], rtol=0.1)
    np.testing.assert_allclose(direct, [0.245, 0.433, 0.491, 0.472], rtol=0.1)


@pytest.mark.parametrize("rule", ["direct", "iso"])
def test_normalised_predictor_with_the_euclidean_metric_has_no_scale(rule):
    """All modes become equal but decay together; with ε > 0 within a run."""
    equal = matrix_trajectory(1500, noise=NOISE, alpha=0.5, normalize=True, rule=rule)[-1]
    lost = matrix_trajectory(1500, noise=NOISE, alpha=1.0, eps=0.25, normalize=True, rule=rule)[-1]
    if rule == "iso":
        np.testing.assert_allclose(equal, 1.658, atol=1e-3)
        np.testing.assert_allclose(lost, 8.3e-4, rtol=0.02)
    else:
        np.testing.assert_allclose(equal[[0, -1]], [1.598, 1.658], atol=1e-3)
        np.testing.assert_allclose(lost, 1.15e-4, rtol=0.02)


def test_euclidean_rates_are_gradients():
    """All four rules against autograd of ½‖p − z'‖² in expectation, noise of unequal strength in the two views."""
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    alpha, c, c_target = 0.7, 1.3, 1.1
    predictor = vectors @ torch.diag(values**alpha) @ vectors.T

    def rate(rule):
        online = weight.clone().requires_grad_()
        target = online if rule == "no_stop_gradient" else weight
        through = torch.eye(3, dtype=torch.float64) if rule == "no_predictor" else predictor
        # E½‖P W x1 − W' x2‖² with E x1 x1ᵀ = c I, E x2 x2ᵀ = c' I, E x1 x2ᵀ = I; iso: straight-through
        p = through @ online
        if rule == "iso":
            p = online + (p - online).detach()
        loss = (c * p.square().sum() - 2 * (p * target).sum() + c_target * target.square().sum()) / 2
        (gradient,) = torch.autograd.grad(loss, online)
        change = -(gradient @ weight.T + weight @ gradient.T)
        return (vectors.T @ change @ vectors).diagonal().numpy()

    for rule in ("direct", "no_stop_gradient", "no_predictor", "iso"):
        options = {"alpha": alpha, "noise": (c - 1) ** 0.5, "target_noise": (c_target - 1) ** 0.5, "rule": rule}
        got = euclidean_rate(values.numpy(), **options)
        np.testing.assert_allclose(got, rate(rule), rtol=1e-10, atol=1e-12, err_msg=rule)


# P12, P13: cosine -----------------------------------------------------------------------------------------------------


def test_p12_direct_conserves_the_trace():
    path = cosine_trajectory(400, step=0.5)
    np.testing.assert_allclose(path[-1], 0.7882, atol=1e-3)
    assert np.abs(path.sum(1) - path[0].sum()).max() < 1e-10


@pytest.mark.parametrize(
    ("alpha", "steps", "scale", "tolerance", "drift"),
    [(1.0, 200, 1.0543, 0.02, 1.4e-2), (0.5, 300, 0.9327, 0.01, 4.9e-3)],
)
def test_p12_iso_conserves_a_power_sum(alpha, steps, scale, tolerance, drift):
    path = cosine_trajectory(steps, step=0.5, rule="iso", alpha=alpha)
    np.testing.assert_allclose(path[-1], scale, rtol=tolerance)
    drifts = []
    for step in (0.5, 0.1):
        power_sum = (
            cosine_trajectory(round(steps * 0.5 / step), step=step, rule="iso", alpha=alpha) ** (1 + alpha)
        ).sum(1)
        drifts.append(abs(power_sum[-1] / power_sum[0] - 1))
    assert drifts[0] == pytest.approx(drift, rel=0.05)
    assert drifts[1] == pytest.approx(drifts[0] / 5, rel=0.1)  # of first order in the step: Euler's, not the flow's


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_p12_no_stop_gradient_loses_dimensions_but_not_the_trace(alpha):
    """The true gradient conserves Σλ; trajectories that diverge come from a wrong rule.

    With α = 1 two modes are left after 300 steps; α = ½ is slower (2.6 after 300, two after 400).
    """
    path = cosine_trajectory(400, step=0.5, rule="no_stop_gradient", alpha=alpha)
    ratio = participation_ratio(path)
    assert ratio[0] == pytest.approx(5.589, abs=1e-3)
    assert ratio[300] == pytest.approx({0.5: 2.615, 1.0: 1.996}[alpha], abs=1e-2)
    assert ratio[400] < 2.1
    assert np.abs(path.sum(1) - path[0].sum()).max() < 1e-8


def test_p13_initial_growth_is_equalised_by_iso():
    squares = np.random.default_rng(0).standard_normal((2000, 10)) ** 2
    start = toy_eigenvalues()

    def slopes(rule, alpha):
        return (cosine_rate(start, squares, rule=rule, alpha=alpha) / start)[:4]

    np.testing.assert_allclose(slopes("direct", 1.0), [0.0055, 0.026, 0.045, 0.065], rtol=0.1)
    np.testing.assert_allclose(slopes("iso", 1.0), [0.277, 0.262, 0.228, 0.189], rtol=0.1)
    np.testing.assert_allclose(slopes("direct", 0.5), [0.042, 0.076, 0.083, 0.078], rtol=0.1)
    np.testing.assert_allclose(slopes("iso", 0.5), [0.295, 0.240, 0.186, 0.134], rtol=0.1)
    assert np.ptp(np.log(slopes("iso", 1.0))) < np.log(1.7)
    assert np.ptp(np.log(slopes("direct", 1.0))) > np.log(10)
    assert not cosine_rate(start, squares, rule="no_predictor").any()


@pytest.mark.parametrize("rule", ["direct", "iso", "no_stop_gradient"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cosine_rates_are_gradients(rule, alpha):
    """Against autograd of −cos on a sample that is symmetric under sign flips, which keeps modes from mixing."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.2, 0.7, 1.5], dtype=torch.float64)
    sample = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    x = (sample[:, None] * signs).reshape(-1, 3)

    online = torch.diag(values.sqrt()).requires_grad_()
    z = x @ online.T
    p = z * values**alpha
    if rule == "iso":
        p = z + (p - z).detach()
    target = z if rule == "no_stop_gradient" else z.detach()
    (gradient,) = torch.autograd.grad(-F.cosine_similarity(p, target).mean(), online)
    change = -(gradient @ online.T + online @ gradient.T).detach()
    torch.testing.assert_close(change, torch.diag(change.diagonal()), rtol=0, atol=1e-12)
    rates = cosine_rate(values.numpy(), (sample**2).numpy(), rule=rule, alpha=alpha)
    np.testing.assert_allclose(rates, change.diagonal().numpy(), rtol=1e-10)


@pytest.mark.parametrize("rule", ["direct", "iso", "no_stop_gradient", "no_predictor"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cosine_steps_are_gradients(rule, alpha):
    """The step on the whole matrix against autograd, two different views."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    first, second = torch.randn(2, 30, 6, dtype=torch.float64, generator=generator)
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    predictor = vectors @ torch.diag(values**alpha) @ vectors.T if rule != "no_predictor" else torch.eye(4).double()

    online = weight.clone().requires_grad_()
    z = first @ online.T
    p = z @ predictor
    if rule == "iso":
        p = z + (p - z).detach()
    target = second @ (online if rule == "no_stop_gradient" else weight).T
    (gradient,) = torch.autograd.grad(-F.cosine_similarity(p, target).mean(), online)
    got = cosine_matrix_step(weight.numpy(), first.numpy(), second.numpy(), step=0.3, rule=rule, alpha=alpha)
    np.testing.assert_allclose(got, (weight - 0.3 * gradient).numpy(), rtol=1e-10, atol=1e-12)


def test_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="rule"):
        cosine_rate(np.ones(2), np.ones((3, 2)), rule="other")
    with pytest.raises(ValueError, match="rule"):
        cosine_matrix_step(np.ones((2, 2)), np.ones((3, 2)), np.ones((3, 2)), step=0.1, rule="other")
    with pytest.raises(KeyError):
        euclidean_rate(np.ones(2), rule="other")


# P14: the deployed loss -----------------------------------------------------------------------------------------------


def deployed_loss(predictor, views, metric, iso):
    """Sum over both directions of batch means, the gradient handed past the predictor for iso."""
    total = 0.0
    for p, z, target in zip(predictor.predict(views), views, reversed(views), strict=True):
        p = z + (p - z).detach() if iso else p
        if metric == "cosine":
            total = total + 2 - 2 * F.cosine_similarity(p, target.detach()).mean()
        else:
            total = total + (p - target.detach()).square().sum(1).mean()
    return total


@pytest.mark.parametrize("iso", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_p14_deployed_losses_run_four_times_as_fast(metric, iso):
    """Autograd on a linear encoder, whitened x; the predictor's scale does not matter for cosine without iso."""
    generator = torch.Generator().manual_seed(0)
    rows, width, noise = 60_000, 6, 0.1 if metric == "euclidean" else 0.0
    x = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    x = torch.linalg.qr(x).Q * rows**0.5
    # two noises, white and uncorrelated with x and with each other on this sample
    both = torch.linalg.qr(torch.cat([x, torch.randn(rows, 2 * width, dtype=torch.float64, generator=generator)], 1)).Q
    first, second = (noise * rows**0.5 * both[:, width * i : width * (i + 1)] for i in (1, 2))
    values = torch.tensor([0.1, 0.3, 0.6, 0.8, 1.1, 1.5], dtype=torch.float64)
    weight = torch.diag(values.sqrt()).requires_grad_()

    predictor = ClosedFormPredictor(width, alpha=1.0, normalize=False, mode="pooled", rho=0.0).double()
    loss = deployed_loss(predictor, [(x + first) @ weight.T, (x + second) @ weight.T], metric, iso)
    (gradient,) = torch.autograd.grad(loss, weight)
    got = (-2 * (gradient @ weight.T).diagonal()).detach().numpy()

    rule = "iso" if iso else "direct"
    if metric == "euclidean":
        # the deployed predictor is the noisy moment c W Wᵀ: twice the noise in d
        c, d = 1 + noise**2, (1 + noise**2) * values.numpy()
        wanted = 2 * values.numpy() * (1 - c * d) * (1 if iso else d)
    else:
        wanted = cosine_rate(values.numpy(), (x**2).numpy(), rule=rule)
    np.testing.assert_allclose(got, 4 * wanted, rtol=0.01, atol=0.01 * np.abs(4 * wanted).max())


# P15: end to end ------------------------------------------------------------------------------------------------------


def participation_while_trained(metric, iso, at):
    """Participation ratio of a linear encoder (32 inputs of variance k^(-½), 16 outputs) after some steps."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, rows, noise = 32, 16, 256, 0.3
    scale = torch.arange(1, inputs + 1) ** -0.25
    weight = (0.1 * torch.randn(outputs, inputs, generator=generator)).requires_grad_()
    predictor = ClosedFormPredictor(outputs, alpha=0.5, rho=0.9, normalize=metric == "cosine")
    ratios = []
    for step in range(1, max(at) + 1):
        x = torch.randn(rows, inputs, generator=generator) * scale
        views = [(x + noise * torch.randn(rows, inputs, generator=generator)) @ weight.T for _ in range(2)]
        (gradient,) = torch.autograd.grad(deployed_loss(predictor, views, metric, iso), weight)
        with torch.no_grad():
            weight -= 0.1 * gradient
        if step in at:
            ratios.append(float(participation_ratio(predictor.eigenvalues.numpy())))
    return ratios


@pytest.mark.slow
@pytest.mark.sample("cosine")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_p15_iso_recruits_modes_sooner_end_to_end(metric):
    early_direct, late_direct = participation_while_trained(metric, False, (60, 300))
    early_iso, late_iso = participation_while_trained(metric, True, (60, 300))
    assert early_direct <= 14.9
    assert early_iso >= 15.2
    assert min(late_direct, late_iso) >= 15.4
