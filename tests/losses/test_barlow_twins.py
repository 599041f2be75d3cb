"""Barlow Twins: known values, slow reference, properties, gradients, ranks, dtypes."""

from itertools import combinations
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.distributed import LOCAL
from plugins.losses import BarlowTwinsLoss, barlow_twins_loss, barlow_twins_terms
from plugins.methods.barlow_twins import SPEC
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views

FORMS = ("auto", "covariance", "gram")
SHAPES = [(6, 4), (5, 9), (40, 3)]


def _reference_barlow_twins(views, lambd=0.0051):
    """Entry by entry of C, in float64."""
    values = []
    for x, y in combinations([np.asarray(view, dtype=np.float64) for view in views], 2):
        n, d = x.shape
        value = 0.0
        for i in range(d):
            for j in range(d):
                a, b = x[:, i] - x[:, i].mean(), y[:, j] - y[:, j].mean()
                c = np.sum(a * b) / n / np.sqrt((np.sum(a**2) / n + 1e-5) * (np.sum(b**2) / n + 1e-5))
                value += (c - 1) ** 2 if i == j else lambd * c**2
        values.append(value)
    return np.mean(values)


def _plain(views, lambd=0.0051):
    """The formula, left to autograd."""
    values = []
    for x, y in combinations(views, 2):
        x, y = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (x, y))
        c = x.T @ y / len(x)
        own = torch.eye(len(c), dtype=torch.bool)
        values.append((c[own] - 1).square().sum() + lambd * c[~own].square().sum())
    return sum(values) / len(values)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_known_values(form):
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    share = 1 / (1 + 1e-5)  # of a variance of 1
    for views, on, off in [
        ((z, z), 2 * (share - 1) ** 2, 0),  # identical white views: 0 up to eps
        ((z, -z), 2 * (share + 1) ** 2, 0),
        ((z, z.flip(1)), 2, 2 * share**2),  # the columns exchanged
        ((z, torch.ones_like(z)), 2, 0),  # a constant embedding
        ((z[:, :1].expand(4, 2), z), (share - 1) ** 2 + 1, share**2),
    ]:
        terms = barlow_twins_terms(*views, lambd=0.3, form=form)
        assert terms.invariance.item() == pytest.approx(on, rel=1e-12, abs=1e-14)
        assert terms.redundancy.item() == pytest.approx(off, rel=1e-12, abs=1e-14)
        assert terms.loss.item() == pytest.approx(on + 0.3 * off, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape, views, form):
    z = toy_views(*shape, views=views)
    expected = _reference_barlow_twins(z, 0.2)
    assert barlow_twins_loss(*z, lambd=0.2, form=form).item() == pytest.approx(expected, rel=1e-12)
    single = [view.float() for view in z]
    assert barlow_twins_loss(*single, lambd=0.2, form=form).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(1, 20), exponent=st.integers(-4, 4), lambd=st.floats(0, 3))
def test_both_forms_agree_at_any_shape_and_scale(rows, width, exponent, lambd):
    views = [10.0**exponent * view for view in toy_views(rows, width)]
    expected = _reference_barlow_twins(views, lambd)
    for form in FORMS:
        assert barlow_twins_loss(*views, lambd=lambd, form=form).item() == pytest.approx(expected, rel=1e-10)


def test_the_default_weight_and_terms():
    views = [view.requires_grad_() for view in toy_views(8, 3)]
    terms = barlow_twins_terms(*views)
    assert [term.requires_grad for term in terms] == [True, False, False]
    assert terms.loss.item() == pytest.approx(terms.invariance.item() + 0.0051 * terms.redundancy.item())
    assert torch.equal(BarlowTwinsLoss()(*views), terms.loss)
    module = BarlowTwinsLoss(lambd=0.5, form="gram")
    assert torch.equal(module(*views), barlow_twins_loss(*views, lambd=0.5, form="gram"))
    assert "lambd=0.5, form='gram'" in repr(module)


def test_the_method_multiplies_the_loss_alone():
    views = toy_views(8, 3)
    criterion = SPEC.loss(SPEC.resolve({"scale_loss": 0.1, "lamb": 0.3}), LOCAL)
    found, terms = criterion(Embeddings(views, views, views)), barlow_twins_terms(*views, lambd=0.3)
    assert found.loss.item() == pytest.approx(0.1 * terms.loss.item()) and found[1:] == terms[1:]


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_invariances(shape):
    z0, z1 = toy_views(*shape)
    loss = barlow_twins_loss(z0, z1).item()
    generator = torch.Generator().manual_seed(0)
    order, columns = torch.randperm(shape[0], generator=generator), torch.randperm(shape[1], generator=generator)
    assert barlow_twins_loss(z1, z0).item() == pytest.approx(loss)
    assert barlow_twins_loss(z0[order], z1[order]).item() == pytest.approx(loss)
    assert barlow_twins_loss(z0[:, columns], z1[:, columns]).item() == pytest.approx(loss)
    assert barlow_twins_loss(z0 + 1e3, z1 - 1e3).item() == pytest.approx(loss)
    assert barlow_twins_loss(50 * z0, z1).item() == pytest.approx(loss, rel=1e-4)  # up to eps
    assert barlow_twins_loss(z0[order], z1).item() != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("form", ["covariance", "gram"])
def test_the_gradient_adds_up_to_nothing_over_the_rows(form):
    """A shift of a column changes nothing; nor does its scale, up to eps."""
    views = [view.requires_grad_() for view in toy_views(9, 6, views=3)]
    for gradient, view in zip(torch.autograd.grad(barlow_twins_loss(*views, form=form), views), views, strict=True):
        assert gradient.sum(0).abs().max() < 1e-14
        assert (gradient * view.detach()).sum(0).abs().max() < 1e-3 * gradient.abs().max()


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["covariance", "gram"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_autograd(shape, views, form):
    z = [view.requires_grad_() for view in toy_views(*shape, views=views)]
    expected = torch.autograd.grad(_plain(z, 0.2), z)
    found = torch.autograd.grad(3 * barlow_twins_loss(*z, lambd=0.2, form=form), z)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", ["covariance", "gram"])
def test_gradcheck_where_eps_counts(form):
    views = [(1e-3 * view).requires_grad_() for view in toy_views(5, 4)]
    assert torch.autograd.gradcheck(
        lambda *z: barlow_twins_loss(*z, lambd=0.2, form=form), views, eps=1e-9, atol=1e-4, rtol=1e-4
    )


def test_no_gradient_is_made_where_none_is_wanted():
    views = toy_views(5, 4)
    assert not barlow_twins_loss(*views).requires_grad
    views[0].requires_grad_()
    with torch.no_grad():
        assert not barlow_twins_loss(*views).requires_grad


# --- ranks ----------------------------------------------------------------------------------------------------------


def _covariance_step(comm, model, *x):
    return barlow_twins_loss(*map(model, x), lambd=0.2, comm=comm, form="covariance")


def _gram_step(comm, model, *x):
    return barlow_twins_loss(*map(model, x), lambd=0.2, comm=comm, form="gram")


def _wide():
    return toy_mlp(5, 40)


@pytest.mark.ddp
@pytest.mark.parametrize("build", [None, _wide])
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("step", [_covariance_step, _gram_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts, build):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts, build=build)


def _traffic(comm, *views):
    """Numbers of floats that are sent in forward, and of calls in backward."""
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    views = [view.requires_grad_() for view in views]
    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        loss = barlow_twins_loss(*views, comm=comm)
        forward = sent.copy()
        loss.backward()
    return forward, len(sent) - len(forward)


@pytest.mark.ddp
@pytest.mark.parametrize(("width", "sent"), [(4, [2, 8, 8, 16]), (30, [2, 2 * 10 * 30, 1 + 2 * 30])])
def test_sends_the_smaller_thing_and_nothing_in_backward(ranks, width, sent):
    """Counts, means, variances and C; or counts, rows, and sums of the columns."""
    parts = list(zip(*(view.split(10) for view in toy_views(20, width)), strict=True))
    assert ranks.run(_traffic, parts) == [(sent, 0)] * 2


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for arguments, options, message in [
        ([z, z[:, :2]], {}, r"z1 must have the shape of z0, \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 2, {}, "the Barlow Twins loss needs at least 2 rows over all processes, got 1"),
        ([z] * 2, {"form": "dual"}, "form must be one of auto, covariance, gram, got 'dual'"),
        ([z] * 2, {"lambd": -1}, r"lambd must be in \[0, inf\), got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            barlow_twins_loss(*arguments, **options)
        if options:
            with pytest.raises(ValueError, match=message):
                BarlowTwinsLoss(**options)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, device):
    views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
    expected = _reference_barlow_twins([view.detach().double().cpu() for view in views])
    for form in ("covariance", "gram"):
        loss = barlow_twins_loss(*views, form=form)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, views))
    if kind in ("constant", "zero", "duplicated"):
        assert loss.item() == pytest.approx(shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    views = [view.to(dtype) for view in toy_views(64, 24)]
    with torch.autocast("cpu", dtype=dtype):
        loss = barlow_twins_loss(*views)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_barlow_twins([view.double() for view in views]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_compiles_to_one_graph(shape):
    views = [view.float().requires_grad_() for view in toy_views(*shape)]
    compiled = torch.compile(barlow_twins_loss, fullgraph=True, backend="aot_eager")
    expected, found = barlow_twins_loss(*views), compiled(*views)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, views), torch.autograd.grad(expected, views))
