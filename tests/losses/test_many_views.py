"""More than two views: the pairs that each method compares, its formula over them, gradients, ranks."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from plugins.distributed import LOCAL
from plugins.losses import (
    byol_loss,
    isoloss,
    matrix_ssl_loss,
    matrix_ssl_pair_terms,
    matrix_ssl_terms,
    mec_loss,
    mec_pair_terms,
    mec_terms,
    ssl_ey_loss,
    ssl_ey_terms,
)
from plugins.methods import METHODS
from plugins.spec import Embeddings
from plugins.testing import NARROW, OF_VIEWS, assert_joined, toy_mlp, toy_views

FORMS = ("covariance", "gram")
SHAPES = [(6, 4), (5, 9)]  # (rows, width)
PREDICTING = ("byol", "directcopy", "directpred", "isocopy", "isoloss", "simsiam")
WIDTH = 8


def _embeddings(rows, *, large, small, seed=0):
    """Projections and predictions of all views, targets of the large ones, in float64."""
    count = large + small
    every = [view.requires_grad_() for view in toy_views(rows, WIDTH, views=2 * count + large, seed=seed)]
    return Embeddings(every[:count], every[count : 2 * count], [view.detach() for view in every[2 * count :]])


def _criterion(method, comm=LOCAL):
    spec = METHODS[method]
    given = {**NARROW, "proj_output_dim": WIDTH, "n_classes": WIDTH, "num_prototypes": WIDTH}
    return spec.loss(spec.resolve({key: value for key, value in given.items() if key in spec.options}), comm)


def _maps(method, z):
    """Maps of 2 x 2 and 3 x 3 locations that are functions of the projections; none if the method needs none."""
    taps = METHODS[method].taps(METHODS[method].resolve({}))
    turns = [torch.linspace(0, 1, side**2, dtype=torch.float64).view(side, side) for side in (2, 3)[: len(taps)]]
    return [tuple((view[:, :, None, None] + turn).sin() for turn in turns) for view in z] if taps else []


def _reference_ssl_ey(views):
    """The mean over all pairs of -2 tr C + ||C_a + C_b||^2, each pair with separate covariances, in float64."""
    centred = [np.asarray(view.detach()) - np.asarray(view.detach()).mean(0) for view in views]
    n = len(centred[0])
    values = []
    for x, y in combinations(centred, 2):
        v = (x.T @ x + y.T @ y) / (n - 1)
        values.append(-4 * np.trace(x.T @ y) / (n - 1) + (v**2).sum())
    return np.mean(values)


@pytest.mark.parametrize("method", OF_VIEWS)
def test_sums_over_pairs_grow_with_the_views_and_means_do_not(method):
    """Eight equal views, two of them large, have 14 equal pairs in place of 2; docs/solo.md advises accordingly."""
    losses = []
    for count in (2, 8):
        z, p = toy_views(16, WIDTH)
        criterion = _criterion(method).eval()
        e = Embeddings([z] * count, [p] * count, [z.detach()] * 2, maps=_maps(method, [z] * count))
        losses.append(criterion(e).loss.item())
    ratio = losses[1] / losses[0]
    summed = method in PREDICTING and method != "simsiam"
    assert ratio == pytest.approx(7, rel=1e-6) if summed else 0.9 < ratio < 2


# --- the formula over the pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "small"), [(1, 1), (1, 2), (2, 0), (2, 1), (2, 3), (3, 0)])
@pytest.mark.parametrize("method", PREDICTING)
def test_each_large_views_target_is_predicted_from_every_other_view(method, large, small):
    e = _embeddings(6, large=large, small=small)
    values = []
    for b in range(large):
        for a in {*range(large + small)} - {b}:
            iso = method in ("isocopy", "isoloss")
            values.append(isoloss(e.z[a], e.p[a], e.target[b]) if iso else byol_loss(e.p[a], e.target[b]))
    expected = torch.stack(values).sum()
    if method == "simsiam":  # the mean of -cos
        expected = expected / (2 * len(values)) - 1
    terms = _criterion(method)(e)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    assert -1 <= terms.cosine.item() <= 1


def test_the_value_is_that_of_one_number_for_each_pair():
    """Two large views and a crop with cosines that are known: 2 - 2 cos of the pairs (0, 1), (1, 0), (2, 0), (2, 1)."""
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    e = Embeddings([east] * 3, [east, north, -east], [east, north])
    assert _criterion("byol")(e).loss.item() == 2 + 2 + 4 + 2


@pytest.mark.parametrize(("method", "loss"), [("matrix_ssl", matrix_ssl_loss), ("mec", mec_loss)])
@pytest.mark.parametrize(("large", "small"), [(1, 1), (2, 1), (2, 2), (3, 0)])
def test_matrix_losses_are_the_mean_over_the_ordered_pairs(method, loss, large, small):
    e = _embeddings(6, large=large, small=small)
    criterion = _criterion(method)
    options = {"eps_d": criterion.eps_d} if method == "mec" else {}
    pairs = [(a, b) for b in range(large) for a in range(large + small) if a != b]
    # a pair twice is the mean of the pair
    values = [loss(e.p[a], e.p[a], e.target[b], e.target[b], **options) for a, b in pairs]
    expected = torch.stack(values).mean()
    found = criterion(e).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    live = [e.p[a] for a in sorted({a for a, _ in pairs})]
    for one, other in zip(torch.autograd.grad(found, live), torch.autograd.grad(expected, live), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("views", [2, 3, 5])
def test_ssl_ey_is_the_mean_over_the_unordered_pairs(form, shape, views):
    z = toy_views(*shape, views=views)
    expected = pytest.approx(_reference_ssl_ey(z), rel=1e-11)
    assert ssl_ey_loss(*z, form=form).item() == expected
    for order in list(permutations(range(views)))[:4]:
        assert ssl_ey_loss(*(z[v] for v in order), form=form).item() == expected


@pytest.mark.parametrize("estimator", ["plugin", "split", "ustat"])
def test_ssl_eys_terms_are_means_over_the_pairs(estimator):
    z = toy_views(7, 4, views=4)
    pairs = [ssl_ey_terms(a, b, estimator=estimator) for a, b in combinations(z, 2)]
    found = ssl_ey_terms(*z, estimator=estimator)
    for name, value in found._asdict().items():
        expected = torch.stack([getattr(pair, name) for pair in pairs]).mean()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.loss, found.whitening + found.alignment - 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ssl_eys_gradient_is_that_of_the_pairs(form, shape):
    z = [view.requires_grad_() for view in toy_views(*shape, views=4)]
    expected = torch.stack([ssl_ey_loss(a, b) for a, b in combinations(z, 2)]).mean()
    of_pairs = torch.autograd.grad(expected, z)
    for one, other in zip(torch.autograd.grad(ssl_ey_loss(*z, form=form), z), of_pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *views: ssl_ey_loss(*views, form=form), z)


def test_ssl_ey_at_its_minimum_for_any_number_of_views():
    """Views that agree, with covariances that add up to the identity: -min(D, N - 1) for each pair."""
    z = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])
    assert ssl_ey_loss(z, z, z, z).item() == -1


# --- two views are as before ----------------------------------------------------------------------------------------


def test_two_pairs_have_the_same_bits_as_two_views():
    p0, p1, y0, y1 = (view.float().requires_grad_() for view in toy_views(6, WIDTH, views=4))
    for terms, of_pairs in (
        (matrix_ssl_terms(p0, p1, y0, y1), matrix_ssl_pair_terms([(p0, y1), (p1, y0)])),
        (mec_terms(p0, p1, y0, y1, eps_d=0.5), mec_pair_terms([(p0, y1), (p1, y0)], eps_d=0.5)),
    ):
        assert all(torch.equal(one, other) for one, other in zip(terms, of_pairs, strict=True))
        gradients = [torch.autograd.grad(found.loss, (p0, p1)) for found in (terms, of_pairs)]
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("pair_terms", [matrix_ssl_pair_terms, lambda pairs: mec_pair_terms(pairs, eps_d=0.5)])
def test_a_pair_of_other_shape_is_named(pair_terms):
    a, b = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"pairs\[1\]\[1\] must have the shape of pairs\[0\]\[0\]"):
        pair_terms([(a, a), (a, b)])


@pytest.mark.parametrize("pair_terms", [matrix_ssl_pair_terms, lambda pairs: mec_pair_terms(pairs, eps_d=0.5)])
def test_no_pair_is_refused(pair_terms):
    with pytest.raises(ValueError, match="at least one matrix is needed, got none"):
        pair_terms([])


# --- several processes ----------------------------------------------------------------------------------------------


def _encoder():
    return toy_mlp(WIDTH, WIDTH)


class _Step:
    """A step of one method, in a form that can be sent to another process."""

    def __init__(self, method):
        self.method = method

    def __call__(self, comm, model, *views):
        z = [model(view) for view in views]
        target = z[:2] if self.method in ("cissl", "dissl") else [view.detach() for view in z[:2]]
        e = Embeddings(z, z[1:] + z[:1], target, maps=_maps(self.method, z))
        return _criterion(self.method, comm)(e).loss


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (2, 6, 3)])
@pytest.mark.parametrize("method", [name for name in OF_VIEWS if METHODS[name].views is None])
def test_ranks_equal_the_joined_batch(ranks, method, counts):
    assert_joined(ranks, _Step(method), toy_views(sum(counts), WIDTH, views=4), counts, build=_encoder)
