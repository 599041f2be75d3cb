"""IsoLoss: the published expression's gradient, BYOL's value, and the identities between the two."""

import pytest
import torch

from plugins.losses import IsoLoss, byol_loss, isoloss, isoloss_terms
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views

METRICS = ("cosine", "euclidean")
PREDICTORS = [(0.5, 0.0), (1.0, 0.25), (2.0, 0.1)]


def _case(alpha, eps, rows=64, width=16):
    """z with gradient, target, and W = (C / max + eps)^alpha with its square root."""
    z, target = toy_views(rows, width)
    values, vectors = torch.linalg.eigh(z.T @ z / rows)
    values = (values.clamp_min(0) / values.max() + eps) ** alpha
    w, root = (vectors * values @ vectors.T, vectors * values.sqrt() @ vectors.T)
    return z.requires_grad_(), target, w, root


def _published_isoloss(z, target, w, root, metric):
    """The expression of the paper's code: a surrogate whose value is no distance."""
    p, q = z @ w, z @ root
    if metric == "euclidean":
        return (z - (target + z - p).detach()).square().sum(1).mean()
    lengths, target_lengths = p.norm(dim=1).detach(), target.norm(dim=1)
    inner = (p * target).sum(1).detach()
    first = (z * target).sum(1) / (lengths * target_lengths)
    return -2 * (first - 0.5 * inner / (lengths**3 * target_lengths) * q.square().sum(1)).mean()


def _gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


def test_known_value_and_gradient():
    z = torch.tensor([[1.0, 1.0]], requires_grad=True)
    p, target = z.detach() @ torch.diag(torch.tensor([1.0, 0.5])), torch.tensor([[1.0, 0.0]])
    loss = isoloss(z, p, target, metric="euclidean")
    assert loss.item() == 0.25
    assert _gradient(loss, z).tolist() == [[0.0, 1.0]]  # 2 (p - target); BYOL's would be [0, 0.5]


@pytest.mark.parametrize(("alpha", "eps"), PREDICTORS)
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_is_that_of_the_published_expression(metric, alpha, eps):
    z, target, w, root = _case(alpha, eps)
    found = _gradient(isoloss(z, z @ w, target, metric=metric), z)
    assert (found - _gradient(_published_isoloss(z, target, w, root, metric), z)).abs().max() < 1e-12


@pytest.mark.parametrize(("alpha", "eps"), PREDICTORS)
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_by_z_is_that_of_byol_by_p(metric, alpha, eps):
    z, target, w, _ = _case(alpha, eps)
    p = (z @ w).detach().requires_grad_()
    found = _gradient(isoloss(z, z @ w, target, metric=metric), z)
    assert (found - _gradient(byol_loss(p, target, metric=metric), p)).abs().max() < 1e-12
    through = _gradient(byol_loss(z @ w, target, metric=metric), z)
    assert (through - found @ w).abs().max() < 1e-12  # BYOL's gradient is IsoLoss's times W
    if metric == "cosine":
        assert (p * found).sum(1).abs().max() < 1e-12
        assert (z * through).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize(("alpha", "eps"), PREDICTORS)
@pytest.mark.parametrize("metric", METRICS)
def test_value_is_that_of_byol(metric, alpha, eps):
    """The published cosine expression logs a number that is no similarity; this one is in [0, 4]."""
    z, target, w, _ = _case(alpha, eps)
    assert torch.equal(isoloss(z, z @ w, target, metric=metric), byol_loss(z @ w, target, metric=metric))
    terms = isoloss_terms(z, z @ w, target, metric=metric)
    assert torch.equal(terms.loss, IsoLoss(metric=metric)(z, z @ w, target))
    assert terms.similarity.item() == pytest.approx(torch.cosine_similarity(z @ w, target).mean().item())
    assert metric in repr(IsoLoss(metric=metric))


@pytest.mark.parametrize(("alpha", "eps"), PREDICTORS)
def test_square_root_of_the_predictor_is_not_needed(alpha, eps):
    z, _, w, root = _case(alpha, eps)
    assert ((z @ root).square().sum(1) - (z * (z @ w)).sum(1)).abs().max() < 1e-12


def test_scale_of_the_predictor_is_a_learning_rate_for_isoloss_only():
    z, target, w, _ = _case(0.5, 0.0)
    for k in (0.5, 2.0):
        iso = _gradient(isoloss(z, z @ w, target), z), _gradient(isoloss(z, z @ (k * w), target), z)
        base = _gradient(byol_loss(z @ w, target), z), _gradient(byol_loss(z @ (k * w), target), z)
        assert (iso[1] - iso[0] / k).abs().max() < 1e-12
        assert (base[1] - base[0]).abs().max() < 1e-12


@pytest.mark.parametrize("metric", METRICS)
def test_is_byol_without_a_predictor_when_all_eigenvalues_are_alike(metric):
    z, target, _, _ = _case(0.5, 0.0)
    identity = torch.eye(16, dtype=torch.float64)
    found = _gradient(isoloss(z, z @ identity, target, metric=metric), z)
    for loss in (byol_loss(z @ identity, target, metric=metric), byol_loss(z, target, metric=metric)):
        assert (found - _gradient(loss, z)).abs().max() < 1e-12


@pytest.mark.parametrize("metric", METRICS)
def test_gradient_reaches_z_only(metric):
    z, p, target = (view.requires_grad_() for view in toy_views(6, 4, views=3))
    isoloss(z, p, target, metric=metric).backward()
    assert p.grad is None and target.grad is None and z.grad.abs().sum() > 0


@pytest.mark.parametrize("metric", METRICS)
def test_value_does_not_suffer_from_a_large_z(metric):
    """z + stop_gradient(p - z) would round p off where z is large."""
    p, target = (view.float() for view in toy_views(6, 4))
    z = (1e6 * p).requires_grad_()
    assert torch.equal(isoloss(z, p, target, metric=metric), byol_loss(p, target, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
def test_sum_over_both_orders_ignores_which_view_is_first(metric):
    z0, z1, y0, y1 = toy_views(6, 4, views=4)
    _, _, w, _ = _case(0.5, 0.0, width=4)
    one = isoloss(z0, z0 @ w, y1, metric=metric) + isoloss(z1, z1 @ w, y0, metric=metric)
    other = isoloss(z1, z1 @ w, y0, metric=metric) + isoloss(z0, z0 @ w, y1, metric=metric)
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


def _predicted(model, x):
    z = model(x)
    return z, z * torch.tensor([1.0, 0.5, 0.2, 0.1])


def _cosine_step(comm, model, x0, x1):
    return isoloss(*_predicted(model, x0), model(x1), comm=comm)


def _euclidean_step(comm, model, x0, x1):
    return isoloss(*_predicted(model, x0), model(x1), metric="euclidean", comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(8, 3), (4, 4, 4), (2, 9, 1)])
@pytest.mark.parametrize("step", [_cosine_step, _euclidean_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5), counts)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(1, 5), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, metric, device):
    """A zero row included, where the published expression divides by |p|^3 = 0."""
    z, target = (view.to(device, dtype) for view in difficult_views(kind, *shape))
    z.requires_grad_()
    loss = isoloss(z, z / 2, target, metric=metric)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("metric", METRICS)
def test_autocast_computes_in_float32(metric, device):
    z, target = (100 * view.to(device, torch.float16) for view in toy_views(64, 32))
    with torch.autocast(device, dtype=torch.float16):
        loss = isoloss(z, z, target, metric=metric)
    assert torch.equal(loss, byol_loss(z.float(), target.float(), metric=metric))


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"p must have the shape of z, \(4, 3\), got \(4, 2\)"):
        isoloss(z, z[:, :2], z)
    with pytest.raises(ValueError, match="metric must be one of"):
        isoloss(z, z, z, metric="l2")
    with pytest.raises(ValueError, match="metric must be one of"):
        IsoLoss(metric="l2")


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_compiles_to_one_graph(metric):
    z, p, target = (view.float() for view in toy_views(8, 4, views=3))
    z.requires_grad_()
    found = torch.compile(isoloss, fullgraph=True, backend="aot_eager")(z, p, target, metric=metric)
    expected = isoloss(z, p, target, metric=metric)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_gradient(found, z), _gradient(expected, z))
