"""Rectified LpJEPA: known values, slow reference, the target distribution, draws, several processes."""

import copy
import math

import numpy as np
import pytest
import torch

from plugins.distributed import LOCAL
from plugins.generalized_gaussian import (
    draw_generalized_gaussian,
    rectified_moments,
    rectified_unit_variance_scale,
    unit_variance_scale,
)
from plugins.losses import RectifiedLpJEPALoss, rectified_lpjepa_loss, rectified_lpjepa_terms
from plugins.losses.rectified_lpjepa import PROJECTIONS, projection_directions
from plugins.methods import METHODS
from plugins.spec import Embeddings
from plugins.testing import assert_joined, toy_views

LAPLACE = math.sqrt(0.5)


def _normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _directions(count, width):
    drawn = _normal(count, width, seed=2)
    return drawn / drawn.norm(dim=1, keepdim=True)


def _reference(views, directions, targets, w_inv=25.0, w_rdm=125.0):
    """One view, direction and pair at a time."""
    pairs = [(u, v) for u in range(len(views)) for v in range(u)]
    invariance = np.mean([np.mean((views[u] - views[v]) ** 2) for u, v in pairs])
    distances = [
        np.mean([(found - wanted) ** 2 for found, wanted in zip(sorted(z @ a), sorted(targets @ a), strict=True)])
        for z in views
        for a in directions
    ]
    return w_inv * invariance + w_rdm * np.mean(distances)


def _plain(views, axes, targets, w_inv=25.0, w_rdm=125.0):
    """The formula left to autograd; the directions of each view."""
    pairs = [(views[u] - views[v]).square().mean() for u in range(len(views)) for v in range(u)]
    distances = [
        ((z @ a.T).sort(0).values - (targets @ a.T).sort(0).values).square().mean()
        for z, a in zip(views, axes, strict=True)
    ]
    return w_inv * torch.stack(pairs).mean() + w_rdm * torch.stack(distances).mean()


def test_known_values():
    targets, a = _normal(6, 4), _directions(9, 4)
    zero = torch.zeros(2, 6, 4, dtype=torch.float64)
    terms = rectified_lpjepa_terms(zero, a, targets)
    assert terms.rdm.item() == pytest.approx((targets @ a.T).square().mean().item(), rel=1e-12)
    assert terms.invariance.item() == 0
    shuffled = targets[torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    assert rectified_lpjepa_loss([shuffled, shuffled], a, targets).item() == pytest.approx(0, abs=1e-20)
    single = rectified_lpjepa_terms([targets[:1] + 1, targets[:1] + 1], a, targets[:1])
    assert single.rdm.item() == pytest.approx(a.sum(1).square().mean().item(), rel=1e-12)
    z0, z1 = toy_views(6, 4)
    two, three = (rectified_lpjepa_terms(z, a, targets).invariance.item() for z in ([z0, z1], [z0, z1, z1]))
    assert two == pytest.approx((z0 - z1).square().mean().item(), rel=1e-12)
    assert three == pytest.approx(2 / 3 * two, rel=1e-12)


def test_a_zero_embedding_has_the_second_moment_of_the_target():
    """0.5 for the rectified Laplace distribution: the value of a collapse in the logs."""
    loss = RectifiedLpJEPALoss(num_projections=64)
    found = loss.terms(torch.zeros(2, 4000, 16, dtype=torch.float64)).rdm.item()
    assert found == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_equals_the_slow_reference(views, kind):
    z, a, targets = toy_views(7, 4, views=views), _directions(9, 4), _normal(7, 4)
    weights = {"invariance_loss_weight": 2.0, "rdm_reg_loss_weight": 3.0}
    free = [view.requires_grad_() for view in z]
    loss = rectified_lpjepa_loss(free, a, targets, projection_vectors_type=kind, **weights)
    with torch.no_grad():
        axes = projection_directions(torch.stack(free), a, kind).expand(views, -1, -1)
    if kind == "random":
        arrays = [view.detach().numpy() for view in z], a.numpy(), targets.numpy()
        assert loss.item() == pytest.approx(_reference(*arrays, 2.0, 3.0), rel=1e-10)
    plain = _plain(free, axes, targets, 2.0, 3.0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-10)
    for ours, theirs in zip(torch.autograd.grad(loss, free), torch.autograd.grad(plain, free), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_singular_vectors_of_each_view_come_first():
    z, a = torch.stack(toy_views(9, 4)), _directions(6, 4)
    every = projection_directions(z, a, "torch_svd_and_random")
    half = projection_directions(z, a, "torch_svd_bottom_half_eigen_and_random")
    assert every.shape == half.shape == (2, 6, 4)
    assert torch.equal(every[1, 4:], a[4:]) and torch.equal(half[0, 2:], a[2:])
    torch.testing.assert_close(half[:, :2], every[:, 2:4])
    for view, vectors in zip(z, every, strict=True):
        spreads = ((view - view.mean(0)) @ vectors[:4].T).square().sum(0)
        eigenvalues = torch.linalg.eigvalsh((view - view.mean(0)).T @ (view - view.mean(0)))
        torch.testing.assert_close(spreads, eigenvalues.flip(0))
    assert projection_directions(z, a[:3], "torch_svd_and_random").shape == (2, 3, 4), "P below D"


def test_blocks_of_directions_add_up(monkeypatch):
    z, a, targets = toy_views(7, 4), _directions(50, 4), _normal(7, 4)
    expected = rectified_lpjepa_loss(z, a, targets).item()
    monkeypatch.setattr("plugins.linalg.CPU_SCORES", 70)
    assert rectified_lpjepa_loss(z, a, targets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("p", "mean"), [(1.0, 0.0), (2.0, -1.0), (0.5, 0.3), (3.0, -0.5), (1.0, 2.0)])
def test_moments_of_the_rectified_distribution(p, mean):
    """Those of an integral over the density on a grid; and the draws have them."""
    scale = unit_variance_scale(p)
    x = np.linspace(mean - 60, mean + 60, 600_001)
    density = np.exp(-((np.abs(x - mean) / scale) ** p) / p)
    density /= density.sum()
    assert np.sum(density * (x - mean) ** 2) == pytest.approx(1, rel=1e-4)
    y = np.maximum(x, 0)
    expected = np.sum(density * y)
    moments = rectified_moments(p, mean, scale)
    assert moments == pytest.approx((expected, np.sum(density * y**2) - expected**2), rel=1e-3)
    assert rectified_moments(p, mean, rectified_unit_variance_scale(p, mean))[1] == pytest.approx(1, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    drawn = (mean + scale * draw_generalized_gaussian(400, 500, p, generator)).relu()
    assert (drawn.mean().item(), drawn.var().item()) == pytest.approx(moments, rel=0.05)


def test_moments_that_are_known():
    assert rectified_moments(1.0, 0.0, LAPLACE) == pytest.approx((LAPLACE / 2, 0.375), rel=1e-12)
    assert rectified_unit_variance_scale(1.0, 0.0) == pytest.approx(2 / math.sqrt(3), rel=1e-12)
    gaussian = rectified_moments(2.0, 0.0, 1.0)
    assert gaussian == pytest.approx((1 / math.sqrt(2 * math.pi), 0.5 - 0.5 / math.pi), rel=1e-12)
    assert rectified_unit_variance_scale(2.0, 0.0) == pytest.approx(1.7129, rel=1e-4)


def test_draws_depend_on_seed_and_step_and_the_options():
    z = [view.relu() for view in toy_views(6, 4)]
    module = RectifiedLpJEPALoss(num_projections=8)
    saved = copy.deepcopy(module)
    first, second = module(z).item(), module(z).item()
    assert first != second and saved(z).item() == first
    resumed = RectifiedLpJEPALoss(num_projections=8)
    resumed.load_state_dict(saved.state_dict())
    assert resumed(z).item() == second
    assert RectifiedLpJEPALoss(num_projections=8, seed=1)(z).item() != first
    _, rectified = module.draw(5, 4, 0, z[0])
    _, whole = RectifiedLpJEPALoss(num_projections=8, target_distribution="lp_distribution").draw(5, 4, 0, z[0])
    assert torch.equal(rectified, whole.relu()) and whole.min() < 0
    _, moved = RectifiedLpJEPALoss(num_projections=8, mean_shift_value=10.0, mode_of_sigma="sigma_RGN").draw(
        9, 4, 0, z[0]
    )
    assert moved.min() > 0


def test_the_projector_is_that_of_the_published_code():
    spec = METHODS["rectified_lpjepa"]
    widths = {"proj_hidden_dim": 8, "proj_output_dim": 6}
    rectified, plain = (
        spec.head(5, spec.resolve({**widths, "projector_type": kind})) for kind in ("rectified_mlp", "mlp")
    )
    assert [type(layer).__name__ for layer in rectified][-2:] == ["Linear", "ReLU"]
    assert set(rectified.state_dict()) == set(plain.state_dict()) >= {"0.weight", "3.bias", "6.bias"}
    criterion = spec.loss(spec.resolve({"num_projections": 4}), LOCAL)
    z = toy_views(6, 4, views=3)
    assert criterion(Embeddings(z, z, z[:2])).loss.item() == RectifiedLpJEPALoss(num_projections=4)(z).item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, a, y: rectified_lpjepa_loss(z[:1], a, y), "needs at least 2 views, got 1"),
        (lambda z, a, y: rectified_lpjepa_loss(z, a, y[:5]), r"targets \[6, 4\], got \(5, 4\) and \(5, 4\)"),
        (lambda z, a, y: rectified_lpjepa_loss(z, a[:, :3], y), r"directions must be \[P, 4\]"),
        (lambda z, a, y: rectified_lpjepa_loss(z, a, y, rdm_reg_loss_weight=-1), "rdm_reg_loss_weight must be in"),
        (lambda z, a, y: rectified_lpjepa_loss(z, a, y, projection_vectors_type="svd"), "must be one of random, torch"),
        (lambda z, a, y: RectifiedLpJEPALoss(lp_norm_parameter=0.0), r"lp_norm_parameter must be in \[0.1, 100\]"),
        (lambda z, a, y: RectifiedLpJEPALoss(mode_of_sigma="one"), "mode_of_sigma must be one of sigma_GN, sigma_RGN"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_views(6, 4), _directions(5, 4), _normal(6, 4))


def _step(comm, model, z0, z1, z2):
    loss = RectifiedLpJEPALoss(num_projections=7, comm=comm)
    return loss([model(z0), model(z1), model(z2)])


def _step_with_singular_vectors(comm, model, z0, z1):
    kind = "torch_svd_bottom_half_eigen_and_random"
    return RectifiedLpJEPALoss(num_projections=7, projection_vectors_type=kind, comm=comm)([model(z0), model(z1)])


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(8, 3), (2, 9, 1), (5, 0, 4)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    assert_joined(ranks, _step, toy_views(sum(counts), 5, views=3), counts)
    assert_joined(ranks, _step_with_singular_vectors, toy_views(sum(counts), 5), counts)
