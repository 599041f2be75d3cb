"""BYOL's loss for one ordered pair: known values, slow reference, identities, ranks, dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.losses import BYOLLoss, byol_loss, byol_terms
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views

METRICS = ("cosine", "euclidean")


def _reference_byol(p, target, metric):
    """Row by row, in float64."""
    total = 0.0
    for a, b in zip(np.asarray(p, dtype=np.float64), np.asarray(target, dtype=np.float64), strict=True):
        if metric == "cosine":
            total += 2 - 2 * float(a @ b) / (np.sqrt(a @ a) * np.sqrt(b @ b))
        else:
            total += float((a - b) @ (a - b))
    return total / len(p)


def test_known_values():
    p = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, -5.0], [1.0, -1.0]])  # cosines 1, -1, 0
    assert byol_loss(p, target).item() == pytest.approx((0 + 4 + 2) / 3)
    assert byol_loss(p, target, metric="euclidean").item() == pytest.approx((4 + 49 + 4) / 3)
    assert byol_loss(p, p).item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), width=st.integers(1, 30), exponent=st.integers(-4, 4), seed=st.integers(0, 99))
def test_equals_slow_reference_at_any_shape_and_scale(rows, width, exponent, seed):
    p, target = (10.0**exponent * view for view in toy_views(rows, width, seed=seed))
    for metric in METRICS:
        expected = _reference_byol(p, target, metric)
        assert byol_loss(p, target, metric=metric).item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        single = byol_loss(p.float(), target.float(), metric=metric).item()
        # a cosine of D terms is rounded to D eps, whatever is left of 2 - 2 cos
        assert single == pytest.approx(_reference_byol(p.float(), target.float(), metric), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_terms_and_module(metric):
    p, target = toy_views(9, 6)
    p.requires_grad_()
    terms = byol_terms(p, target, metric=metric)
    assert torch.equal(terms.loss, byol_loss(p, target, metric=metric))
    assert torch.equal(terms.loss, BYOLLoss(metric=metric)(p, target))
    assert terms.similarity.item() == pytest.approx(torch.cosine_similarity(p, target).mean().item())
    assert terms.loss.requires_grad and not terms.similarity.requires_grad
    assert metric in repr(BYOLLoss(metric=metric))


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric):
    p, target = toy_views(5, 4)
    assert torch.autograd.gradcheck(lambda a: byol_loss(a, target, metric=metric), p.requires_grad_())


def test_gradient_is_the_closed_form():
    p, y = toy_views(64, 16)
    p.requires_grad_()
    lengths, target_lengths = p.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    inner = (p * y).sum(1, keepdim=True)
    expected = -2 / 64 / (lengths * target_lengths) * (y - inner / lengths**2 * p)
    (cosine,) = torch.autograd.grad(byol_loss(p, y), p)
    (euclidean,) = torch.autograd.grad(byol_loss(p, y, metric="euclidean"), p)
    assert (cosine - expected).abs().max() < 1e-12
    assert (euclidean - 2 / 64 * (p - y)).abs().max() < 1e-12
    assert (p * cosine).sum(1).abs().max() < 1e-12  # no component along p


@pytest.mark.parametrize("metric", METRICS)
def test_no_gradient_reaches_the_target(metric):
    p, target = (view.requires_grad_() for view in toy_views(5, 4))
    byol_loss(p, target, metric=metric).backward()
    assert target.grad is None and p.grad.abs().sum() > 0


@pytest.mark.parametrize("metric", METRICS)
def test_sum_over_both_orders_ignores_which_view_is_first(metric):
    z0, z1 = toy_views(5, 4)
    y0, y1 = toy_views(5, 4, seed=1)
    one = byol_loss(z0, y1, metric=metric) + byol_loss(z1, y0, metric=metric)
    other = byol_loss(z1, y0, metric=metric) + byol_loss(z0, y1, metric=metric)
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


def test_cosine_ignores_the_length_of_rows():
    p, target = toy_views(5, 4)
    lengths = torch.tensor([[0.1], [1.0], [10.0], [1e3], [1e-3]])
    assert byol_loss(lengths * p, 7 * target).item() == pytest.approx(byol_loss(p, target).item(), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_equals_siamese_loss_without_a_teacher(metric):
    """With target = stop_gradient(z): the value and gradient that a teacher copied from the student would give."""
    z0, z1 = toy_views(6, 4)
    first, second = z0.clone().requires_grad_(), z0.clone().requires_grad_()
    byol_loss(first, z1.clone(), metric=metric).backward()
    byol_loss(second, z1.requires_grad_(), metric=metric).backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=0)
    assert z1.grad is None


def _cosine_step(comm, model, x0, x1):
    return byol_loss(model(x0), model(x1), comm=comm)


def _euclidean_step(comm, model, x0, x1):
    return byol_loss(model(x0), model(x1), metric="euclidean", comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (0, 7)])
@pytest.mark.parametrize("step", [_cosine_step, _euclidean_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5), counts)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(1, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, metric, device):
    p, target = (view.to(device, dtype) for view in difficult_views(kind, *shape))
    p.requires_grad_()
    loss = byol_loss(p, target, metric=metric)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert p.grad.dtype == dtype and p.grad.isfinite().all()
    if kind == "zero":  # no direction: orthogonal by convention, and no gradient of 1 / eps
        assert loss.item() == (2 if metric == "cosine" else 0)
        assert not p.grad.any()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype, metric, device):
    p, target = (100 * view.to(device, dtype) for view in toy_views(64, 32))
    with torch.autocast(device, dtype=dtype):
        loss = byol_loss(p, target, metric=metric)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_byol(p.float().cpu(), target.float().cpu(), metric), rel=1e-5)


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"target must have the shape of p, \(4, 3\), got \(4, 2\)"):
        byol_loss(z, z[:, :2])
    with pytest.raises(ValueError, match="metric must be one of cosine, euclidean, got 'l2'"):
        byol_loss(z, z, metric="l2")
    with pytest.raises(ValueError, match="metric must be one of"):
        BYOLLoss(metric="l2")
    with pytest.raises(ValueError, match="at least 1 rows over all processes, got 0"):
        byol_loss(z[:0], z[:0])
    with pytest.raises(ValueError, match=r"p must be of a floating-point dtype, got torch\.int64"):
        byol_loss(z.long(), z)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_compiles_to_one_graph(metric):
    p, target = (view.float() for view in toy_views(8, 4))
    p.requires_grad_()
    found, expected = (
        torch.compile(byol_loss, fullgraph=True, backend="aot_eager")(p, target, metric=metric),
        byol_loss(p, target, metric=metric),
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, p), torch.autograd.grad(expected, p))
