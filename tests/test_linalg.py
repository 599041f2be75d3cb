"""Shared algebra: against numpy, at the limits of scale, with gradients."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from plugins.linalg import (
    attach_gradient,
    covariance_eigenvalues,
    effective_rank,
    eigh,
    eigvalsh,
    gram_is_cheaper,
    joined_mean,
    labelled_mean,
    logarithm,
    pack_symmetric,
    participation_ratio,
    polynomial,
    power_traces,
    spectral_radius,
    split_square,
    squared_norm,
    standardized_rows,
    tangent,
    unit_rows,
    unpack_symmetric,
    ustat_square,
)
from plugins.testing import DIFFICULT, difficult_views, toy_views


def test_gram_only_when_smaller():
    assert gram_is_cheaper(3, 4)
    assert not gram_is_cheaper(4, 4)
    assert not gram_is_cheaper(5, 4)


def test_the_mean_over_labelled_rows_and_its_gradient():
    values = torch.tensor([[1.0, 5.0], [3.0, 7.0], [8.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    mean = labelled_mean(values, mask)
    assert mean.tolist() == [2.0, 0.0]
    mean.sum().backward()
    assert values.grad.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]
    assert labelled_mean(values * torch.nan, mask).isnan().all(), "NaN shows, also that of a row without a label"


def test_squared_norm_and_its_gradient():
    matrix = toy_views(5, 4, views=1)[0].requires_grad_()
    assert squared_norm(matrix).item() == pytest.approx((matrix**2).sum().item())
    squared_norm(matrix).backward()
    torch.testing.assert_close(matrix.grad, 2 * matrix.detach())


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(1, 9), exponent=st.integers(-6, 6), shift=st.floats(-1e3, 1e3))
def test_standardized_rows_give_the_covariance(rows, width, exponent, shift):
    z = 10.0**exponent * (toy_views(rows, width, views=1)[0] + shift)
    s, factor = standardized_rows(z)
    expected = np.atleast_2d(np.cov(z.numpy().T))
    assert np.abs((s.T @ s).numpy() - expected).max() <= 1e-9 * expected.max()
    assert factor == pytest.approx((rows - 1) ** -0.5)


def test_standardized_rows_keep_a_small_variance_beside_a_large_mean():
    z = toy_views(64, 3, views=1)[0]
    s, _ = standardized_rows((z + 1000).float())
    np.testing.assert_allclose((s.T @ s).numpy(), np.cov(z.numpy().T), rtol=1e-3)


def test_standardized_rows_of_several_views_are_separate():
    views = torch.stack(toy_views(5, 3))
    s, _ = standardized_rows(views)
    for view, of_view in zip(views, s, strict=True):
        torch.testing.assert_close(of_view, standardized_rows(view)[0])


def test_too_few_rows():
    with pytest.raises(ValueError, match="a covariance needs at least 2 rows"):
        standardized_rows(torch.ones(1, 3))
    with pytest.raises(ValueError, match="a batch mean needs at least 1 rows"):
        joined_mean(torch.ones(0))
    for estimate in (split_square, ustat_square):
        with pytest.raises(ValueError, match="needs at least 4 rows"):
            estimate(torch.ones(2, 3, 3))


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("form", ["auto", "covariance", "gram"])
@pytest.mark.parametrize(("rows", "width"), [(4, 3), (5, 7)])
def test_unbiased_squares_equal_their_definitions(rows, width, form, views):
    z = torch.stack(toy_views(rows, width, views=views))
    quadruples = list(itertools.permutations(range(rows), 4))
    total = sum(
        ((u[i] - u[j]) @ (v[k] - v[m])).item() ** 2 / 4
        for u, v in itertools.product(z, repeat=2)
        for i, j, k, m in quadruples
    )
    assert ustat_square(z, form=form).item() == pytest.approx(total / len(quadruples), rel=1e-11)
    even, odd = (sum(np.cov(view[part::2].numpy().T) for view in z) for part in (0, 1))
    assert split_square(z, form=form).item() == pytest.approx(np.trace(even @ odd), rel=1e-11)


@pytest.mark.parametrize(("rows", "width"), [(20, 4), (5, 9)])
def test_covariance_eigenvalues(rows, width):
    (z,) = toy_views(rows, width, views=1)
    expected = np.linalg.eigvalsh(np.cov(z.numpy().T))[-min(rows, width) :]
    np.testing.assert_allclose(covariance_eigenvalues(z).numpy(), expected, atol=1e-12)
    assert covariance_eigenvalues(z.requires_grad_().to(torch.bfloat16)).dtype == torch.float32
    assert not covariance_eigenvalues(z).requires_grad


@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_spectral_measures_are_finite_and_in_range(kind, shape):
    for view in difficult_views(kind, *shape):
        eigenvalues = covariance_eigenvalues(view)
        for measure in (participation_ratio, effective_rank):
            assert 0 <= measure(eigenvalues) <= min(shape) + 1e-4


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 9), padding=st.integers(0, 9), exponent=st.integers(-30, 30))
def test_spectral_measures_count_equal_modes_at_any_scale(count, padding, exponent):
    eigenvalues = torch.cat([torch.full((count,), 10.0**exponent), torch.zeros(padding)])
    assert participation_ratio(eigenvalues).item() == pytest.approx(count, rel=1e-5)
    assert effective_rank(eigenvalues).item() == pytest.approx(count, rel=1e-5)


def test_spectral_measures_of_no_variance_and_of_rounding():
    assert participation_ratio(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0
    rounded = torch.tensor([1.0, 1.0, -1e-7])
    assert participation_ratio(rounded).item() == effective_rank(rounded).item() == pytest.approx(2)


def test_participation_ratio_is_its_formula():
    s = torch.tensor([3.0, 1.0, 0.5, 0.25])
    assert participation_ratio(s).item() == pytest.approx((s.sum() ** 2 / (s**2).sum()).item())
    share = (s / s.sum()).numpy()
    assert effective_rank(s).item() == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_attached_gradients_are_scaled_by_what_comes_from_above():
    x, y = (view.requires_grad_() for view in toy_views(3, 2))
    value = attach_gradient(torch.tensor(5.0, dtype=torch.float64), [x, y], [2 * x.detach(), torch.ones_like(y)])
    (3 * value).backward()
    assert value.item() == 5
    torch.testing.assert_close(x.grad, 6 * x.detach())
    torch.testing.assert_close(y.grad, 3 * torch.ones_like(y))


def test_an_attached_gradient_survives_a_retained_graph():
    """The incoming gradient 1 hands out the stored gradient itself: .grad is a copy, and a change of it is noticed."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    value = attach_gradient(torch.tensor(5.0), [x], [2 * x.detach()])
    for factor, expected in ((1.0, [2.0, 4.0]), (1.0, [4.0, 8.0]), (1.5, [7.0, 14.0])):
        value.backward(torch.tensor(factor), retain_graph=True)
        assert x.grad.tolist() == expected
    (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
    gradient.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def _symmetric(size, *, positive=False, seed=0):
    a, b = toy_views(size, size, seed=seed)
    matrix = torch.stack([a, b])
    return matrix @ matrix.mT / size**2 if positive else matrix + matrix.mT


def test_covariances_divided_by_the_number_of_rows():
    (z,) = toy_views(9, 4, views=1)
    s, factor = standardized_rows(z, unbiased=False)
    np.testing.assert_allclose((s.T @ s).numpy(), np.cov(z.numpy().T, ddof=0), rtol=1e-12)
    assert factor == pytest.approx(1 / 3)


def test_unit_rows_and_the_way_back():
    (z,) = toy_views(5, 4, views=1)
    z[3] = 0
    unit, inverse = unit_rows(z)
    np.testing.assert_allclose(unit.norm(dim=1), [1, 1, 1, 0, 1], rtol=1e-12)
    weights = toy_views(5, 4, seed=1)[0]
    free = z[[0, 1, 2, 4]].requires_grad_()
    (free / free.norm(dim=1, keepdim=True) * weights[[0, 1, 2, 4]]).sum().backward()
    found = tangent(weights.clone(), unit, inverse)
    torch.testing.assert_close(found[[0, 1, 2, 4]], free.grad)
    assert (found[3] == 0).all()


def test_two_symmetric_matrices_share_one():
    a, b = _symmetric(5), _symmetric(5, seed=1)
    assert pack_symmetric(a, b).shape == (2, 6, 5)
    for found, expected in zip(unpack_symmetric(pack_symmetric(a, b)), (a, b), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
def test_power_traces_and_their_derivative(order):
    x = torch.stack(toy_views(4, 4)).requires_grad_()
    coefficients = [1 / (k + 2) * (-1) ** k for k in range(order)]
    powers = [torch.linalg.matrix_power(x, k) for k in range(1, order + 1)]
    f = sum(c * p for c, p in zip(coefficients, powers, strict=True))
    expected = f.diagonal(dim1=-2, dim2=-1).sum(-1)
    found, derivative = power_traces(x.detach(), coefficients)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative.mT, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4, 5, 8])
def test_polynomial_and_its_derivative(degree):
    b, direction = _symmetric(4) / 8, _symmetric(4, seed=1)
    coefficients = [(k + 1) * (-1.0) ** k for k in range(degree + 1)]
    b.requires_grad_()
    f = sum(c * torch.linalg.matrix_power(b, k) for k, c in enumerate(coefficients))
    (expected,) = torch.autograd.grad((direction * f).sum() + 0 * b.sum(), b)
    value, slope = polynomial(b.detach(), direction, coefficients)
    torch.testing.assert_close(value, f.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("mu", [0.3, 1.0])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 1e-9])
def test_logarithm_and_its_derivative(scale, mu, divided):
    """Against scipy's logm and central differences; eigenvalues near and at 0 are where the expansion takes over."""
    (b, _), (direction, _) = scale * _symmetric(4, positive=True), _symmetric(4, seed=1)
    eye = np.eye(4)

    def function(matrix):
        if scale == 1:
            log = linalg.logm(eye + matrix / mu)
            return np.linalg.solve(matrix, log) if divided else log
        # logm loses what is small beside 1; of log(1 + x) / x = 1 - x / 2 + ... a dozen terms suffice here
        ratio = sum((-1) ** k / (k + 1) * np.linalg.matrix_power(matrix / mu, k) for k in range(12)) / mu
        return ratio if divided else matrix @ ratio

    value, slope = logarithm(b, direction, mu, divided=divided)
    np.testing.assert_allclose(value, function(b.numpy()), rtol=1e-10, atol=1e-12)
    step = 1e-5
    difference = (function((b + step * direction).numpy()) - function((b - step * direction).numpy())) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-6 * abs(difference).max())
    value, slope = logarithm(torch.zeros(4, 4), direction.float(), mu, divided=divided)  # all eigenvalues equal
    torch.testing.assert_close(slope, direction.float() * (-1 / (2 * mu**2) if divided else 1 / mu))


@pytest.mark.parametrize("width", [2, 3, 16, 40])
def test_solver_survives_matrices_of_rank_one(width):
    """The matrices are rounding errors, or of rows on a line; LAPACK's float32 solver raises or gives NaN for some."""
    eye = torch.eye(width)
    for seed, rows in itertools.product(range(40), (2, 6)):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randn(1, width, generator=generator)
        for z in (row.expand(rows, width), torch.randn(rows, 1, generator=generator) * row):
            unit = torch.nn.functional.normalize(z)
            s = (unit - unit.mean(0)) / rows**0.5
            matrix = s.T @ s
            values, vectors = eigh(matrix)
            # backward stable: a modest multiple of the width in units of the last place of the largest eigenvalue
            error = 16 * width * torch.finfo(torch.float32).eps
            assert (vectors.T @ vectors - eye).abs().max() <= error
            assert ((vectors * values) @ vectors.T - matrix).abs().max() <= error * matrix.abs().max()
            torch.testing.assert_close(eigvalsh(matrix), values, rtol=0, atol=error * matrix.abs().max().item())


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (30, 20)])
def test_spectrum_of_what_is_not_finite_is_refused(shape):
    for value in (float("nan"), float("inf")):
        z = torch.ones(shape)
        z[1, 1] = value
        with pytest.raises(ValueError, match="a spectrum needs finite numbers, got NaN or inf in z"):
            covariance_eigenvalues(z)


def test_spectral_radius():
    x = torch.stack(toy_views(6, 6))
    expected = np.abs(np.linalg.eigvals(x.numpy())).max(-1)
    np.testing.assert_allclose(spectral_radius(x, steps=60), expected, rtol=1e-2)
    shifted = np.abs(np.linalg.eigvals(x.numpy() - 9 * np.eye(6))).max(-1)
    np.testing.assert_allclose(spectral_radius(x, shift=-9, steps=200), shifted, rtol=1e-2)
    turn = 2 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])  # a complex pair
    assert spectral_radius(turn).item() == pytest.approx(2)
    assert spectral_radius(torch.zeros(3, 3)) == 0
