"""I-VNE+: known values, slow reference, properties, gradients, ranks, dtypes."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from plugins.distributed import LOCAL
from plugins.losses import IVNELoss, i_vne_loss, i_vne_terms
from plugins.methods.i_vne import SPEC
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views

FORMS = ("auto", "covariance", "gram")
SHAPES = [(6, 4), (5, 9), (40, 3)]
VIEWS = [(2, 2), (2, 1), (3, 2), (4, 2), (4, 4)]
"""Number of views, and of large ones."""
WEIGHTS = {"alpha_1": 3.0, "alpha_2": 0.7}


def _reference_i_vne(views, alpha_1=4.16, alpha_2=1.0, large=2):
    """Row by row, and eigenvalue by eigenvalue of the D x D matrix, in float64."""
    views = [np.asarray(view, dtype=np.float64) for view in views]
    lengths = [np.linalg.norm(view, axis=1, keepdims=True) for view in views]
    unit = [
        np.where(size > 1e-12, view / np.maximum(size, 1e-12), 0) for view, size in zip(views, lengths, strict=True)
    ]
    cosines = []
    for a in range(large):
        for b in range(a + 1, len(unit)):
            cosines.append(np.mean([np.dot(p, q) for p, q in zip(unit[a], unit[b], strict=True)]))
    entropies = []
    for rows in unit:
        c = sum(np.outer(row, row) for row in rows) / len(rows)
        entropies.append(-sum(value * math.log(value) for value in np.linalg.eigvalsh(c) if value > 1e-14))
    return -alpha_1 * np.mean(cosines) - alpha_2 * np.mean(entropies)


def _plain(views, alpha_1, alpha_2, large):
    """The formula by singular values, left to autograd, as published: it is not finite for a singular value of 0."""
    unit = [normalize(view, dim=1) for view in views]
    cosines = [(unit[a] * unit[b]).sum(1).mean() for a in range(large) for b in range(a + 1, len(unit))]
    spectra = [torch.linalg.svdvals(rows / len(rows) ** 0.5).square() for rows in unit]
    entropies = [-(values * values.log()).nansum() for values in spectra]
    return -alpha_1 * sum(cosines) / len(cosines) - alpha_2 * sum(entropies) / len(entropies)


# --- values ---------------------------------------------------------------------------------------------------------


def _of_shares(*shares):
    """Groups of equal rows, orthogonal to each other, by the number of rows of each."""
    return torch.eye(len(shares), 5, dtype=torch.float64).repeat_interleave(torch.tensor(shares), 0)


@pytest.mark.parametrize("form", FORMS)
def test_known_values(form):
    angle = torch.tensor([[1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)  # two rows at 60 degrees: 3 / 4 and 1 / 4
    for view, entropy in [
        (torch.ones(4, 3, dtype=torch.float64), 0),  # a collapsed embedding
        (torch.eye(4, 6, dtype=torch.float64), math.log(4)),  # the largest value of 4 rows
        (torch.cat([torch.eye(3), -torch.eye(3)]).double(), math.log(3)),  # and of 3 columns
        (angle, math.log(4) - 0.75 * math.log(3)),
        (_of_shares(1, 1, 2), 1.5 * math.log(2)),  # the Shannon entropy of the shares
        (torch.cat([_of_shares(2), torch.zeros(2, 5)]), 0.5 * math.log(2)),  # rows of zeros count in N
    ]:
        share = view.norm(dim=1).gt(0).double().mean().item()
        for sign in (1, -1):
            terms = i_vne_terms(7 * view, sign * view, **WEIGHTS, form=form)
            assert terms.cosine.item() == pytest.approx(sign * share, rel=1e-12)
            assert terms.entropy.item() == pytest.approx(entropy, rel=1e-12, abs=1e-13)
            assert terms.loss.item() == pytest.approx(-3 * sign * share - 0.7 * entropy, rel=1e-12)


def test_published_weights_balance_both_terms():
    """α₁ = 4.16 is log 64, the largest entropy of 64 images."""
    z = torch.eye(64, 256)
    terms = i_vne_terms(z, z)
    assert terms.entropy.item() == pytest.approx(4.16, rel=1e-3)
    assert terms.loss.item() == pytest.approx(-4.16 - math.log(64), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("views", "large"), VIEWS)
def test_equals_slow_reference(views, large, form):
    for shape in SHAPES:
        z = toy_views(*shape, views=views)
        expected = _reference_i_vne(z, **WEIGHTS, large=large)
        assert i_vne_loss(*z, **WEIGHTS, large=large, form=form).item() == pytest.approx(expected, rel=1e-10)
        single = [view.float() for view in z]
        assert i_vne_loss(*single, **WEIGHTS, large=large, form=form).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(1, 20), exponent=st.integers(-6, 6), weight=st.floats(0, 30))
def test_both_forms_agree_at_any_shape_and_scale(rows, width, exponent, weight):
    views = [10.0**exponent * view for view in toy_views(rows, width)]
    expected = _reference_i_vne(views, alpha_2=weight)
    for form in FORMS:
        assert i_vne_loss(*views, alpha_2=weight, form=form).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_only_the_loss_has_a_gradient():
    views = [view.requires_grad_() for view in toy_views(8, 3)]
    terms = i_vne_terms(*views)
    assert [term.requires_grad for term in terms] == [True, False, False]
    assert terms.loss.item() == pytest.approx((-4.16 * terms.cosine - terms.entropy).item())
    with torch.no_grad():
        quiet = i_vne_terms(*views)
    assert not quiet.loss.requires_grad and quiet.loss.item() == pytest.approx(terms.loss.item(), rel=1e-12)
    assert torch.equal(IVNELoss()(*views), terms.loss)
    module = IVNELoss(**WEIGHTS, large=1, form="gram")
    assert torch.equal(module(*views), i_vne_loss(*views, **WEIGHTS, large=1, form="gram"))
    assert "alpha_1=3.0, alpha_2=0.7, large=1, form='gram'" in repr(module)


@pytest.mark.parametrize("large", [1, 2, 3])
def test_the_method_compares_the_views_that_have_targets_with_all_others(large):
    views = toy_views(8, 3, views=4)
    found = SPEC.loss(SPEC.resolve({"alpha_1": 3.0, "alpha_2": 0.7}), LOCAL)(Embeddings(views, views, views[:large]))
    assert found.loss.item() == pytest.approx(_reference_i_vne(views, **WEIGHTS, large=large))


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_invariances(shape):
    z0, z1, z2, z3 = toy_views(*shape, views=4)
    loss = i_vne_loss(z0, z1, z2, z3).item()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(shape[0], generator=generator)
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator))[0]
    scale = torch.rand(shape[0], 1, dtype=torch.float64, generator=generator) + 0.1
    for views in [
        (z1, z0, z3, z2),
        (z0[order], z1[order], z2[order], z3[order]),
        (z0 @ turn, z1 @ turn, z2 @ turn, z3 @ turn),
        (z0 * scale, 10 * z1, z2, z3),
    ]:
        assert i_vne_loss(*views).item() == pytest.approx(loss)
    for views in [
        (z0[order], z1, z2, z3),  # the views must agree
        (z2, z3, z0, z1),  # two small crops are not compared
        (z0 + 1, z1 + 1, z2 + 1, z3 + 1),  # there is no centring
    ]:
        assert i_vne_loss(*views).item() != pytest.approx(loss, rel=1e-4)


def test_the_sign_of_a_row_only_counts_in_the_cosine():
    z0, z1 = toy_views(9, 6)
    signs = torch.tensor([1, -1, 1, 1, -1, 1, -1, 1, 1]).unsqueeze(1)
    before, after = i_vne_terms(z0, z1), i_vne_terms(z0, z1 * signs)
    assert before.cosine > after.cosine
    assert after.entropy.item() == pytest.approx(before.entropy.item())


def test_the_gradient_has_no_part_along_a_row():
    views = [view.requires_grad_() for view in toy_views(7, 5)]
    for view, gradient in zip(views, torch.autograd.grad(i_vne_loss(*views), views), strict=True):
        assert (view * gradient).sum(1).abs().max() < 1e-14 < gradient.abs().max()


def test_a_step_down_the_gradient_leaves_a_collapsed_embedding():
    """A constant embedding is stationary; the smallest difference between rows grows."""
    z = torch.ones(8, 5, dtype=torch.float64)
    free = [z.clone().requires_grad_() for _ in range(2)]
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(i_vne_loss(*free), free))
    noise = 1e-4 * toy_views(8, 5, views=1)[0]
    free = [(z + noise).requires_grad_() for _ in range(2)]
    moved = [view - len(z) * g for view, g in zip(free, torch.autograd.grad(i_vne_loss(*free), free), strict=True)]
    assert i_vne_terms(*moved).entropy > 10 * i_vne_terms(*free).entropy


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["covariance", "gram"])
@pytest.mark.parametrize(("views", "large"), VIEWS)
def test_gradient_is_that_of_autograd(views, large, form):
    for shape in SHAPES:
        z = [view.requires_grad_() for view in toy_views(*shape, views=views)]
        expected = torch.autograd.grad(_plain(z, **WEIGHTS, large=large), z)
        found = torch.autograd.grad(3 * i_vne_loss(*z, **WEIGHTS, large=large, form=form), z)
        torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", ["covariance", "gram"])
def test_gradient_of_a_batch_with_a_singular_value_of_zero(form):
    """A row of zeros. Autograd of the published formula gives NaN, which its nansum hides in the value."""
    views = [torch.cat([view, torch.zeros(1, 7)]).requires_grad_() for view in toy_views(3, 7)]
    published = _plain(views, **WEIGHTS, large=2)
    assert published.isfinite() and all(g.isnan().any() for g in torch.autograd.grad(published, views))
    found = torch.autograd.grad(i_vne_loss(*views, **WEIGHTS, form=form), views)
    assert all(gradient[3].abs().max() == 0 for gradient in found)
    for view, place in product(range(2), [(0, 0), (1, 4), (2, 6)]):
        values = []
        for step in (1e-6, -1e-6):
            changed = [each.detach().clone() for each in views]
            changed[view][place] += step
            values.append(_reference_i_vne(changed, **WEIGHTS))
        assert found[view][place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8)


# --- ranks ----------------------------------------------------------------------------------------------------------


def _covariance_step(comm, model, *x):
    return i_vne_loss(*map(model, x), **WEIGHTS, comm=comm, form="covariance")


def _gram_step(comm, model, *x):
    return i_vne_loss(*map(model, x), **WEIGHTS, comm=comm, form="gram")


def _wide():
    return toy_mlp(5, 40)


@pytest.mark.ddp
@pytest.mark.parametrize("build", [None, _wide])
@pytest.mark.parametrize("counts", [(8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("step", [_covariance_step, _gram_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts, build):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts, build=build)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for arguments, options, message in [
        ([z, z[:, :2]], {}, r"z1 must have the shape of z0, \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 2, {}, "the I-VNE\\+ loss needs at least 2 rows over all processes, got 1"),
        ([z] * 3, {"large": 4}, r"large must be in \[1, 3\], got 4"),
        ([z] * 2, {"large": 0}, r"large must be in \[1, inf\), got 0"),
        ([z] * 2, {"form": "dual"}, "form must be one of auto, covariance, gram, got 'dual'"),
        ([z] * 2, {"alpha_2": -1}, r"alpha_2 must be in \[0, inf\), got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            i_vne_loss(*arguments, **options)
        if options and options != {"large": 4}:
            with pytest.raises(ValueError, match=message):
                IVNELoss(**options)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_batches_are_finite(kind, device):
    for shape, dtype in product([(2, 5), (64, 16), (16, 64)], [torch.float32, torch.bfloat16, torch.float16]):
        views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
        expected = _reference_i_vne([view.detach().double().cpu() for view in views])
        for form in ("covariance", "gram"):
            loss = i_vne_loss(*views, form=form)
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
            gradients = torch.autograd.grad(loss, views)
            assert all(gradient.isfinite().all() for gradient in gradients), (shape, dtype, form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    views = [view.to(dtype) for view in toy_views(64, 24)]
    with torch.autocast("cpu", dtype=dtype):
        loss = i_vne_loss(*views)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_i_vne([view.double() for view in views]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_compiles_to_one_graph(shape):
    views = [view.float().requires_grad_() for view in toy_views(*shape)]
    compiled = torch.compile(i_vne_loss, fullgraph=True, backend="aot_eager")
    expected, found = i_vne_loss(*views), compiled(*views)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, views), torch.autograd.grad(expected, views))
