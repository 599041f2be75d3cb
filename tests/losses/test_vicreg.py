"""VICReg: known values, slow reference, properties, gradients, ranks, dtypes."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.distributed import LOCAL
from plugins.losses import VICRegLoss, vicreg_loss, vicreg_terms
from plugins.methods.vicreg import SPEC
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views

FORMS = ("auto", "covariance", "gram")
SHAPES = [(6, 4), (5, 9), (40, 3)]
WEIGHTS = {"sim_coeff": 3.0, "std_coeff": 5.0, "cov_coeff": 0.7}
HAND = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
"""White up to the divisor: the unbiased covariance is 4 / 3 of the identity."""


def _reference_vicreg(views, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0):
    """Pair by pair and entry by entry, in float64."""
    values = []
    for x, y in combinations([np.asarray(view, dtype=np.float64) for view in views], 2):
        n, d = x.shape
        value = sim_coeff * sum((x[i, j] - y[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
        for z in (x, y):
            for i in range(d):
                for j in range(d):
                    c = np.sum((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())) / (n - 1)
                    if i == j:
                        value += std_coeff / 2 * max(0.0, 1 - np.sqrt(c + 1e-4)) / d
                    else:
                        value += cov_coeff * c**2 / d
        values.append(value)
    return np.mean(values)


def _plain(views, sim_coeff, std_coeff, cov_coeff):
    """The formula, left to autograd."""
    values = []
    for x, y in combinations(views, 2):
        value = sim_coeff * (x - y).square().mean()
        for z in (x, y):
            c = torch.cov(z.T).view(z.shape[1], -1)
            own = torch.eye(len(c), dtype=torch.bool)
            value = value + std_coeff / 2 * (1 - (c[own] + 1e-4).sqrt()).relu().mean()
            value = value + cov_coeff * c[~own].square().sum() / len(c)
        values.append(value)
    return sum(values) / len(values)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_known_values(form):
    zero, flat = torch.zeros_like(HAND), 0.5 * HAND
    short = 1 - (1 / 3 + 1e-4) ** 0.5  # of a standard deviation, the variance being 4 / 3 / 4
    for views, expected in [
        ((HAND, HAND), (0, 0, 0)),  # equal, of variance above 1, and uncorrelated
        ((HAND, -HAND), (4, 0, 0)),
        ((zero, zero), (0, 0.99, 0)),  # a collapsed embedding
        ((HAND, zero), (1, 0.99 / 2, 0)),
        ((flat, flat), (0, short, 0)),
        ((HAND[:, :1].expand(4, 2), HAND), (1, 0, (4 / 3) ** 2)),  # one column, twice: 2 C_01^2 / D
    ]:
        terms = vicreg_terms(*views, **WEIGHTS, form=form)
        for found, value in zip(terms[1:], expected, strict=True):
            assert found.item() == pytest.approx(value, rel=1e-12, abs=1e-14)
        loss = sum(weight * value for weight, value in zip(WEIGHTS.values(), expected, strict=True))
        assert terms.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape, views, form):
    z = toy_views(*shape, views=views)
    expected = _reference_vicreg(z, **WEIGHTS)
    assert vicreg_loss(*z, **WEIGHTS, form=form).item() == pytest.approx(expected, rel=1e-12)
    single = [view.float() for view in z]
    assert vicreg_loss(*single, **WEIGHTS, form=form).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(1, 20), exponent=st.integers(-3, 3), weight=st.floats(0, 30))
def test_both_forms_agree_at_any_shape_and_scale(rows, width, exponent, weight):
    views = [10.0**exponent * view for view in toy_views(rows, width)]
    expected = _reference_vicreg(views, sim_coeff=weight)
    for form in FORMS:
        assert vicreg_loss(*views, sim_coeff=weight, form=form).item() == pytest.approx(expected, rel=1e-9)


def test_the_default_weights_and_terms():
    views = [view.requires_grad_() for view in toy_views(8, 3)]
    terms = vicreg_terms(*views)
    assert [term.requires_grad for term in terms] == [True, False, False, False]
    expected = 25 * terms.invariance + 25 * terms.variance + terms.covariance
    assert terms.loss.item() == pytest.approx(expected.item())
    assert torch.equal(VICRegLoss()(*views), terms.loss)
    module = VICRegLoss(**WEIGHTS, form="gram")
    assert torch.equal(module(*views), vicreg_loss(*views, **WEIGHTS, form="gram"))
    assert "sim_coeff=3.0, std_coeff=5.0, cov_coeff=0.7, form='gram'" in repr(module)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (25, 25, 1)),
        ({"sim_loss_weight": 2, "var_loss_weight": 3, "cov_loss_weight": 4}, (2, 6, 4)),  # solo-learn: a sum over views
        ({"lambda_param": 2, "mu_param": 3, "nu_param": 4}, (2, 3, 4)),  # lightly
    ],
)
def test_the_method_knows_the_names_of_the_frameworks(given, expected):
    views = toy_views(8, 3)
    found = SPEC.loss(SPEC.resolve(given), LOCAL)(Embeddings(views, views, views))
    assert found.loss.item() == pytest.approx(_reference_vicreg(views, *expected))


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_invariances(shape):
    z0, z1 = toy_views(*shape)
    loss = vicreg_loss(z0, z1).item()
    generator = torch.Generator().manual_seed(0)
    order, columns = torch.randperm(shape[0], generator=generator), torch.randperm(shape[1], generator=generator)
    assert vicreg_loss(z1, z0).item() == pytest.approx(loss)
    assert vicreg_loss(z0[order], z1[order]).item() == pytest.approx(loss)
    assert vicreg_loss(z0[:, columns], z1[:, columns]).item() == pytest.approx(loss)
    assert vicreg_loss(z0 + 1e3, z1 + 1e3).item() == pytest.approx(loss)
    assert vicreg_loss(z0[order], z1).item() != pytest.approx(loss, rel=1e-3)  # the views must agree
    assert vicreg_loss(2 * z0, 2 * z1).item() != pytest.approx(loss, rel=1e-3)  # the scale counts


def test_the_views_only_meet_in_the_invariance():
    z0, z1 = toy_views(9, 6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    before, after = vicreg_terms(z0, z1), vicreg_terms(z0, z1[order])
    assert after.invariance > before.invariance
    torch.testing.assert_close(after[2:], before[2:])


def test_a_column_that_varies_enough_has_no_gradient_of_the_hinge():
    views = [view.requires_grad_() for view in (3 * HAND, HAND.clone())]
    gradients = torch.autograd.grad(vicreg_loss(*views, sim_coeff=0, cov_coeff=0), views)
    assert all(gradient.abs().max() == 0 for gradient in gradients)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["covariance", "gram"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_autograd(shape, views, form):
    z = [(0.8 * view).requires_grad_() for view in toy_views(*shape, views=views)]  # some columns below 1, some above
    expected = torch.autograd.grad(_plain(z, **WEIGHTS), z)
    found = torch.autograd.grad(3 * vicreg_loss(*z, **WEIGHTS, form=form), z)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-10, atol=1e-13)


def test_no_gradient_is_made_where_none_is_wanted():
    views = toy_views(5, 4)
    assert not vicreg_loss(*views).requires_grad
    views[0].requires_grad_()
    with torch.no_grad():
        assert not vicreg_loss(*views).requires_grad


# --- ranks ----------------------------------------------------------------------------------------------------------


def _covariance_step(comm, model, *x):
    return vicreg_loss(*map(model, x), **WEIGHTS, comm=comm, form="covariance")


def _gram_step(comm, model, *x):
    return vicreg_loss(*map(model, x), **WEIGHTS, comm=comm, form="gram")


def _wide():
    return toy_mlp(5, 40)


@pytest.mark.ddp
@pytest.mark.parametrize("build", [None, _wide])
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("step", [_covariance_step, _gram_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts, build):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts, build=build)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for arguments, options, message in [
        ([z, z[:, :2]], {}, r"z1 must have the shape of z0, \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 2, {}, "the VICReg loss needs at least 2 rows over all processes, got 1"),
        ([z] * 2, {"form": "dual"}, "form must be one of auto, covariance, gram, got 'dual'"),
        ([z] * 2, {"std_coeff": -1}, r"std_coeff must be in \[0, inf\), got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            vicreg_loss(*arguments, **options)
        if options:
            with pytest.raises(ValueError, match=message):
                VICRegLoss(**options)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, device):
    views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
    expected = _reference_vicreg([view.detach().double().cpu() for view in views])
    for form in ("covariance", "gram"):
        loss = vicreg_loss(*views, form=form)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4)
        inputs = views
        if kind == "large" and dtype == torch.float16:  # the gradient itself may exceed 65504
            inputs = [view.detach().float().requires_grad_() for view in views]
            loss = vicreg_loss(*inputs, form=form)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    views = [view.to(dtype) for view in toy_views(64, 24)]
    with torch.autocast("cpu", dtype=dtype):
        loss = vicreg_loss(*views)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_vicreg([view.double() for view in views]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_compiles_to_one_graph(shape):
    views = [view.float().requires_grad_() for view in toy_views(*shape)]
    compiled = torch.compile(vicreg_loss, fullgraph=True, backend="aot_eager")
    expected, found = vicreg_loss(*views), compiled(*views)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, views), torch.autograd.grad(expected, views))
