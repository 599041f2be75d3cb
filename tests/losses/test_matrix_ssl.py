"""Matrix-SSL: known values, slow reference, the formula as executed, gradients, ranks, dtypes, collapse, divergence."""

import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch.utils.flop_counter import FlopCounterMode

from plugins.losses import MatrixSSLLoss, matrix_ssl_loss, matrix_ssl_terms
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views, waves

FORMS = ("auto", "covariance", "gram")
SHAPES = [(6, 4), (5, 7), (9, 18), (40, 3)]
OPTIONS = [
    {},
    {"mce_lambd": 0.5, "mce_mu": 0.5},
    {"mce_lambd": 0.3, "mce_mu": 0.9, "gamma": 0.7, "mce_order": 5},
    {"mce_order": 1},
    {"mce_order": 2, "mce_mu": 0.8},
    {"mce_order": 3, "trace_term": True, "mce_mu": 0.6},
    {"logarithm": "exact"},
    {"logarithm": "exact", "mce_mu": 0.6, "mce_lambd": 1.3, "gamma": 0.4, "trace_term": True},
]
pytestmark = pytest.mark.filterwarnings("ignore:the exact logarithm is another objective")


def _covariances(p, z):
    """C_pz, C_pp, C_zz of unit rows, centred afterwards, over N; row by row."""
    p, z = (np.asarray(each, dtype=np.float64) for each in (p, z))
    p, z = (np.stack([row / np.sqrt((row**2).sum()) for row in each]) for each in (p, z))
    p, z = p - p.mean(0), z - z.mean(0)
    n = len(z)
    return tuple(sum(np.outer(a[i], b[i]) for i in range(n)) / n for a, b in ((p, z), (p, p), (z, z)))


def _series(q, order):
    """The logarithm's Taylor series about the identity, term by term."""
    e = q - np.eye(len(q))
    return sum((-1) ** (k + 1) / k * np.linalg.matrix_power(e, k) for k in range(1, order + 1))


def _reference_matrix_ssl(
    z0, z1, p0, p1, *, mce_lambd=1.0, mce_mu=1.0, gamma=1.0, mce_order=4, logarithm="series", trace_term=False
):
    def log(q):
        return linalg.logm(q) if logarithm == "exact" else _series(q, mce_order)

    total = 0.0
    for z, p in ((z0, p1), (z1, p0)):
        c_pz, c_pp, c_zz = _covariances(p, z)
        shift = mce_mu * np.eye(len(c_pz))
        for weight, left, right in ((1.0, mce_lambd * np.eye(len(c_pz)), c_pz), (gamma, c_pp + shift, c_zz)):
            entropy = -np.trace(left @ log(right + shift))
            total += weight / 2 * (entropy + (np.trace(right + shift) if trace_term else 0))
    return total.real


def _as_executed(z0, z1, p0, p1, lambd=1.0, mu=1.0, gamma=1.0, order=4):
    """The formula with its N x N centring matrix, left to autograd."""
    total = 0
    for z, p in ((z0, p1), (z1, p0)):
        z, p = z / z.norm(dim=1, keepdim=True), (p / p.norm(dim=1, keepdim=True)).detach()
        n, eye = len(z), torch.eye(z.shape[1], dtype=z.dtype)
        centre = torch.eye(n, dtype=z.dtype) - 1 / n
        for weight, left, right in (
            (1, lambd * eye, p.T @ centre @ z / n),
            (gamma, p.T @ centre @ p / n + mu * eye, z.T @ centre @ z / n),
        ):
            power, log = eye, 0
            for k in range(1, order + 1):
                power = power @ (right + (mu - 1) * eye)
                log = log + (-1) ** (k + 1) / k * power
            total = total - weight * torch.trace(left @ log) / 2
    return total


def _batch(rows, width, dtype=torch.float64):
    return toy_views(rows, width, views=4, dtype=dtype)


def _free(rows, width):
    z0, z1, p0, p1 = _batch(rows, width)
    return [z0.requires_grad_(), z1.requires_grad_()], [p0, p1]


def _simplex(rows):
    """Unit rows with mean zero and covariance I / (rows - 1), in rows - 1 columns."""
    centred = torch.eye(rows, dtype=torch.float64) - 1 / rows
    basis = torch.linalg.svd(centred).U[:, : rows - 1]
    points = centred @ basis
    return points / points.norm(dim=1, keepdim=True)


def _modes(count, width):
    """Rows ±e_1 to ±e_count: the covariance has ``count`` eigenvalues 1 / count."""
    eye = torch.eye(width, dtype=torch.float64)[:count]
    return torch.cat([eye, -eye])


def _log4(x):
    return x - x**2 / 2 + x**3 / 3 - x**4 / 4


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "ones", "halves"),
    [
        ((6, 4), -1.0958799064865241, 2.2630594224537983),
        ((5, 7), -0.8539574986719828, 4.549066689729534),
    ],
)
def test_golden_values(form, shape, ones, halves):
    # computed apart from this repository, in numpy, from the formula with matrix powers
    views = [waves(scale, *shape) for scale in (1.0, 1.1, 1.3, 0.7)]
    assert matrix_ssl_loss(*views, form=form).item() == pytest.approx(ones, rel=1e-12)
    loss = matrix_ssl_loss(*views, form=form, mce_lambd=0.5, mce_mu=0.5)
    assert loss.item() == pytest.approx(halves, rel=1e-12)
    assert loss.dtype == torch.float64 and loss.shape == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "uniformity", "alignment", "exact"),
    [
        ((6, 4), -0.08705363483031066, -0.9196271595143025, -0.9342234039241468),
        ((5, 7), -0.03707488133977936, -0.8258312103123493, -0.8291020237749391),
    ],
)
def test_golden_values_of_one_pair(form, shape, uniformity, alignment, exact):
    z, p = waves(1.0, *shape), waves(0.7, *shape)
    terms = matrix_ssl_terms(z, z, p, p, form=form)
    assert terms.uniformity.item() == pytest.approx(uniformity, rel=1e-12)
    assert terms.alignment.item() == pytest.approx(alignment, rel=1e-12)
    # alignment by scipy.linalg.logm
    assert matrix_ssl_terms(z, z, p, p, form=form, logarithm="exact").alignment.item() == pytest.approx(
        exact, rel=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "uniformity", "alignment"),
    [
        ((6, 4), 1.2774043720319235, 1.070015207841481),
        ((5, 7), 2.3417976734157753, 2.2320097565627783),
    ],
)
def test_golden_values_of_one_pair_with_halves(form, shape, uniformity, alignment):
    z, p = waves(1.0, *shape), waves(0.7, *shape)
    # each with the constant that the terms leave out, which a loss of uniformity alone has too
    constant = shape[1] / 2 * (1 / 2 + 1 / 8 + 1 / 24 + 1 / 64)
    terms = matrix_ssl_terms(z, z, p, p, form=form, mce_lambd=0.5, mce_mu=0.5)
    assert terms.uniformity.item() + constant == pytest.approx(uniformity, rel=1e-12)
    assert terms.alignment.item() + constant == pytest.approx(alignment, rel=1e-12)
    alone = matrix_ssl_loss(z, z, p, p, form=form, mce_lambd=0.5, mce_mu=0.5, gamma=0)
    assert alone.item() == pytest.approx(uniformity, rel=1e-12)
    alone = matrix_ssl_loss(z, z, p, p, form=form, mce_lambd=0, mce_mu=0.5)
    assert alone.item() == pytest.approx(alignment, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape, options, form):
    views = _batch(*shape)
    expected = _reference_matrix_ssl(*views, **options)
    assert matrix_ssl_loss(*views, form=form, **options).item() == pytest.approx(expected, rel=1e-12)
    single = [view.float() for view in views]
    # parts of the size of D cancel, each with its rounding error
    assert matrix_ssl_loss(*single, form=form, **options).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(2, 30), order=st.integers(1, 6), exponent=st.integers(-8, 8))
def test_equals_slow_reference_at_any_shape_and_scale(rows, width, order, exponent):
    views = [10.0**exponent * view for view in _batch(rows, width)]
    expected = _reference_matrix_ssl(*views, mce_order=order)
    for form in FORMS:
        assert matrix_ssl_loss(*views, form=form, mce_order=order).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_constant_batches(form):
    """0 at mu = 1; at lambda = mu = 1/2 each part is D/2 (1/2 + 1/8 + 1/24 + 1/64)."""
    constant = torch.full((6, 9), 2.0, dtype=torch.float64)
    for weights in ({"gamma": 0}, {"mce_lambd": 0}):  # the uniformity alone, the alignment alone
        assert matrix_ssl_loss(*[constant] * 4, form=form, **weights).item() == pytest.approx(0, abs=1e-12)
        weights = {"mce_lambd": 0.5, "mce_mu": 0.5, **weights}
        loss = matrix_ssl_loss(*[constant] * 4, form=form, **weights)
        assert loss.item() == pytest.approx(0.5 * 9 * (1 / 2 + 1 / 8 + 1 / 24 + 1 / 64), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_simplex(form):
    """17 corners in 16 dimensions: C = I / 16."""
    corners = _simplex(17)
    terms = matrix_ssl_terms(*[corners] * 4, form=form)
    assert terms.uniformity.item() == pytest.approx(-16 * _log4(1 / 16)) == pytest.approx(-0.9699910481770835)
    assert terms.alignment.item() == pytest.approx(-17 * _log4(1 / 16)) == pytest.approx(-1.0306154886881511)
    assert terms.effective_rank.item() == pytest.approx(16)


@pytest.mark.parametrize("form", FORMS)
def test_line(form):
    v = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    terms = matrix_ssl_terms(*[torch.cat([v, -v, 3 * v, -2 * v])] * 4, form=form)
    assert terms.uniformity.item() == pytest.approx(-7 / 12)
    assert terms.alignment.item() == pytest.approx(-7 / 6)
    assert terms.effective_rank.item() == pytest.approx(1)
    assert terms.radius.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("order", [4, 5])
@pytest.mark.parametrize("options", [{}, {"mce_lambd": 0.5, "mce_mu": 0.5, "gamma": 0.3}])
def test_terms_add_up(options, order):
    (z0, z1), targets = _free(9, 6)
    terms = matrix_ssl_terms(z0, z1, *targets, mce_order=order, **options)
    constant = torch.ones(9, 6, dtype=torch.float64)
    parts = terms.uniformity + options.get("gamma", 1) * terms.alignment
    parts = parts + matrix_ssl_loss(*[constant] * 4, mce_order=order, **options)
    assert parts.item() == pytest.approx(terms.loss.item(), rel=1e-12)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    ratios = []
    for z, p in ((z0, targets[1]), (z1, targets[0])):
        values = np.linalg.eigvalsh(_covariances(p, z.detach())[2])
        ratios.append((values.sum(), (values**2).sum()))
    trace, square = np.sum(ratios, 0)
    assert terms.effective_rank.item() == pytest.approx(trace**2 / square / 2)


def test_module_is_the_function():
    views = _batch(9, 6)
    for options in OPTIONS:
        module = MatrixSSLLoss(form="gram", **options)
        assert torch.equal(module(*views), matrix_ssl_loss(*views, form="gram", **options))
        assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_invariances(shape):
    z0, z1, p0, p1 = views = _batch(*shape)
    loss = matrix_ssl_loss(*views).item()
    generator = torch.Generator().manual_seed(2)
    scales = torch.rand(4, shape[0], 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    rotation = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(shape[0], generator=generator)
    assert matrix_ssl_loss(*(s * v for s, v in zip(scales, views, strict=True))).item() == pytest.approx(loss)
    assert matrix_ssl_loss(*(view @ rotation for view in views)).item() == pytest.approx(loss)
    assert matrix_ssl_loss(*(view[order] for view in views)).item() == pytest.approx(loss)
    assert matrix_ssl_loss(z1, z0, p1, p0).item() == pytest.approx(loss)
    # centring comes after normalisation: a shift beforehand is no invariance; nor is the order within one view
    assert matrix_ssl_loss(*(view + 1 for view in views)).item() != pytest.approx(loss, rel=1e-3)
    assert matrix_ssl_loss(z0[order], z1, p0, p1).item() != pytest.approx(loss, rel=1e-3)


def test_uniformity_is_symmetric_in_student_and_teacher_and_alignment_is_not():
    z, _, p, _ = _batch(9, 6)
    one, other = matrix_ssl_terms(z, z, p, p), matrix_ssl_terms(p, p, z, z)
    assert one.uniformity.item() == pytest.approx(other.uniformity.item())
    assert one.alignment.item() != pytest.approx(other.alignment.item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_order_one_is_linear(shape):
    z, _, p, _ = _batch(*shape)
    c_pz, c_pp, c_zz = _covariances(p, z)
    loss = matrix_ssl_loss(z, z, p, p, mce_order=1, mce_lambd=0.7, mce_mu=0.8, gamma=0)
    assert loss.item() == pytest.approx(-0.7 * (np.trace(c_pz) + (0.8 - 1) * shape[1]))
    terms = matrix_ssl_terms(z, z, p, p, mce_order=1)
    assert terms.alignment.item() == pytest.approx(-np.trace((c_pp + np.eye(shape[1])) @ c_zz))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_series_tends_to_the_exact_logarithm(shape, form):
    z, p = waves(1.0, *shape), waves(0.7, *shape)
    long = matrix_ssl_terms(z, z, p, p, mce_order=32, form=form)
    exact = matrix_ssl_terms(z, z, p, p, logarithm="exact", form=form)
    assert long.radius < 0.6  # else the series needs more terms
    c_pz = _covariances(p, z)[0]
    assert exact.uniformity.item() == pytest.approx(-np.linalg.slogdet(c_pz + np.eye(shape[1]))[1], rel=1e-12)
    assert long.uniformity.item() == pytest.approx(exact.uniformity.item(), abs=1e-8)
    assert long.alignment.item() == pytest.approx(exact.alignment.item(), abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(3, 12))
def test_exact_alignment_is_lowest_at_equal_covariances(seed, rows):
    """Klein's inequality: tr(P (log P - log Q) - P + Q) ≥ 0, and at equal traces -tr(P log Q) is lowest at Q = P."""
    z, p = toy_views(rows, 5, seed=seed)
    _, c_pp, c_zz = _covariances(p, z)
    here, own = (matrix_ssl_terms(v, v, p, p, logarithm="exact").alignment.item() for v in (z, p))
    # traces differ by what the means take: tr C = 1 - |mean|^2
    assert here + np.trace(c_zz) >= own + np.trace(c_pp) - 1e-12
    distance = np.square(c_zz - c_pp).sum()
    # strictly above where the covariances differ: the second derivative of x log x is at least 1/2 in [1, 2]
    assert here + np.trace(c_zz) - own - np.trace(c_pp) >= distance / 4 > 1e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(2, 6))
def test_exact_alignment_at_equal_traces_is_lowest_at_equal_covariances(seed, width):
    """Rows that come with their negatives have mean 0, hence tr C = 1; rows of other signs have the same covariance."""
    z, p = (torch.cat([view, -view]) for view in toy_views(7, width, seed=seed))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()).Q
    own = matrix_ssl_terms(p, p, p, p, logarithm="exact").alignment.item()
    flipped = p * torch.tensor([1.0, -1, 1, 1, -1, -1, -1], dtype=p.dtype).repeat(2)[:, None]
    assert matrix_ssl_terms(flipped, flipped, p, p, logarithm="exact").alignment.item() == pytest.approx(own, rel=1e-12)
    for other in (z, p @ rotation):
        _, c_pp, c_zz = _covariances(p, other)
        assert np.trace(c_pp) == pytest.approx(1) == pytest.approx(np.trace(c_zz))
        distance = np.square(c_zz - c_pp).sum()
        found = matrix_ssl_terms(other, other, p, p, logarithm="exact").alignment.item()
        assert found - own >= distance / 4 - 1e-12
        assert found > own or distance < 1e-12


def test_value_does_not_show_collapse_and_effective_rank_does():
    """Aligned views with r equal modes: -r log_4(1 + 1/r) (2 + 1/r)."""
    values, ranks = {}, {}
    for modes in (1, 2, 3, 10, 64):
        views = [_modes(modes, 64)] * 4
        terms = matrix_ssl_terms(*views)
        values[modes], ranks[modes] = terms.loss.item(), terms.effective_rank.item()
        assert terms.loss.item() == pytest.approx(-modes * _log4(1 / modes) * (2 + 1 / modes))
        exact = matrix_ssl_loss(*views, logarithm="exact").item()
        assert exact == pytest.approx(-modes * np.log1p(1 / modes) * (2 + 1 / modes))
    assert values[3] < values[2] < values[10] < values[64] < values[1]
    assert values[64] - values[3] < 0.01
    assert ranks == pytest.approx({modes: modes for modes in ranks})
    line, full = ([_modes(modes, 64)] * 4 for modes in (1, 64))
    for options in ({"logarithm": "exact"}, {"mce_order": 1}, {"mce_order": 3}):
        assert matrix_ssl_loss(*line, **options) < matrix_ssl_loss(*full, **options) - 0.05, options


def test_trace_term_with_unit_weights_is_lowest_at_collapse():
    constant = torch.ones(8, 4, dtype=torch.float64)
    for views in (_batch(8, 4), [_modes(4, 4)] * 4):
        terms = matrix_ssl_terms(*views, trace_term=True)
        assert terms.uniformity > 0 and matrix_ssl_loss(*[constant] * 4, trace_term=True) == 2 * 4
        assert matrix_ssl_terms(*views, trace_term=True, mce_lambd=2).uniformity < 0


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["covariance", "gram"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (5, 13)])
def test_gradcheck(shape, options, form):
    free, targets = _free(*shape)
    assert torch.autograd.gradcheck(lambda a, b: matrix_ssl_loss(a, b, *targets, form=form, **options), free)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [(1, 1, 1, 4), (0.5, 0.5, 1, 4), (0.7, 0.9, 0.4, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_formula_as_executed(shape, weights, form):
    free, targets = _free(*shape)
    expected = torch.autograd.grad(_as_executed(*free, *targets, *weights), free)
    lambd, mu, gamma, order = weights
    loss = matrix_ssl_loss(*free, *targets, form=form, mce_lambd=lambd, mce_mu=mu, gamma=gamma, mce_order=order)
    found = torch.autograd.grad(3 * loss, free)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["covariance", "gram"])
@pytest.mark.parametrize("shape", [(4, 20), (12, 20), (19, 20), (30, 20)])
def test_exact_gradient_is_finite_where_autograd_is_not(shape, form):
    """With targets of one direction C_pp = 0 and P = I, where -tr log(C_zz + I) is a log-determinant."""
    free, _ = _free(*shape)
    constant = torch.ones(shape, dtype=torch.float64)
    loss = matrix_ssl_loss(*free, constant, constant, form=form, logarithm="exact")
    found = torch.autograd.grad(loss, free)

    def direct(z):
        z = z / z.norm(dim=1, keepdim=True)
        z = z - z.mean(0)
        return -torch.logdet(torch.eye(shape[1]) + z.T @ z / shape[0])

    expected = torch.autograd.grad(sum(direct(z) for z in free) / 2, free)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_no_gradient_reaches_the_targets():
    free, targets = _free(6, 4)
    targets = [target.requires_grad_() for target in targets]
    assert torch.autograd.grad(matrix_ssl_loss(*free, *targets), targets, allow_unused=True) == (None, None)
    assert not matrix_ssl_loss(*(view.detach() for view in free), *targets).requires_grad


@pytest.mark.parametrize("detached", [0, 1])
def test_gradient_of_one_view_only(detached):
    free, targets = _free(6, 4)
    views = [view.detach() if i == detached else view for i, view in enumerate(free)]
    found = torch.autograd.grad(matrix_ssl_loss(*views, *targets), free[1 - detached])
    expected = torch.autograd.grad(_as_executed(*views, *targets), free[1 - detached])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_one_step_gives_the_weights_of_the_formula_as_executed():
    x0, x1, t0, t1 = toy_views(16, 5, views=4, dtype=torch.float32)
    weights = []
    for loss in (matrix_ssl_loss, _as_executed):
        student, teacher = (toy_mlp(5, 8, dtype=torch.float32) for _ in range(2))
        optimizer = torch.optim.SGD(student.parameters(), lr=2.0, momentum=0.9, weight_decay=1e-5)
        with torch.no_grad():
            p0, p1 = teacher(t0), teacher(t1)
        loss(student(x0), student(x1), p0, p1).backward()
        optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))
    assert (weights[0] - torch.cat([p.detach().flatten() for p in toy_mlp(5, 8).parameters()])).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(64, 16), (16, 64)])
def test_costs_what_it_says(rows, width):
    """20 N D^2 + 28 D^3, or 16 N^2 D + 36 N^3; and "auto" takes the smaller."""
    flops = {}
    for form in FORMS:
        free, targets = _free(rows, width)
        with FlopCounterMode(display=False) as counter:
            matrix_ssl_loss(*free, *targets, form=form).backward()
        flops[form] = counter.get_total_flops()
    assert flops["covariance"] == 20 * rows * width**2 + 28 * width**3
    assert flops["gram"] == 16 * rows**2 * width + 36 * rows**3
    assert flops["auto"] == min(flops.values())


# --- ranks ----------------------------------------------------------------------------------------------------------


def _step(comm, model, x0, x1, form="auto", **options):
    with torch.no_grad():
        targets = [model(x.flip(1)) for x in (x0, x1)]
    return matrix_ssl_loss(model(x0), model(x1), *targets, comm=comm, form=form, **options)


def _gram_step(comm, model, x0, x1):
    return _step(comm, model, x0, x1, "gram", mce_mu=0.5, mce_lambd=0.5, gamma=0.4)


def _covariance_step(comm, model, x0, x1):
    return _step(comm, model, x0, x1, "covariance", mce_mu=0.5, mce_lambd=0.5, gamma=0.4)


def _exact_step(comm, model, x0, x1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _step(comm, model, x0, x1, logarithm="exact", trace_term=True)


def _wide():
    return toy_mlp(5, 40)


@pytest.mark.ddp
@pytest.mark.parametrize("build", [None, _wide])
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1)])
@pytest.mark.parametrize("step", [_step, _gram_step, _covariance_step, _exact_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts, build):
    assert_joined(ranks, step, toy_views(sum(counts), 5), counts, build=build)


def _traffic(comm, *views):
    """Numbers of floats sent in forward, how often anything was sent in backward, and the terms."""
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    free = views[0].clone().requires_grad_()
    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        terms = matrix_ssl_terms(free, *views[1:], comm=comm)
        forward = sent.copy()
        terms.loss.backward()
    return forward, len(sent) - len(forward), [term.detach() for term in terms]


@pytest.mark.ddp
@pytest.mark.parametrize("width", [4, 50])
def test_sends_the_smaller_thing_and_nothing_in_backward(ranks, width):
    views = _batch(20, width)
    expected = matrix_ssl_terms(*views)
    parts = list(zip(*(view.split(10) for view in views), strict=True))
    for forward, backward, terms in ranks.run(_traffic, parts):
        assert backward == 0
        # of the rows each process gives its half
        assert 0 <= sum(forward) - min(4 * width**2, 4 * 10 * width) <= 6 * width + 8
        torch.testing.assert_close(terms, list(expected), rtol=1e-10, atol=1e-12)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for arguments, options, message in [
        ([z, z, z, z[:, :2]], {}, r"target1 must have the shape of p0, \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 4, {}, "the Matrix-SSL loss needs at least 2 rows over all processes, got 1"),
        ([z] * 4, {"form": "dual"}, "form must be one of auto, covariance, gram, got 'dual'"),
        ([z] * 4, {"logarithm": "log"}, "logarithm must be one of series, exact, got 'log'"),
        ([z] * 4, {"mce_order": 0}, r"mce_order must be in \[1, inf\), got 0"),
        ([z] * 4, {"mce_order": 1.5}, "mce_order must be an integer, got 1.5"),
        ([z] * 4, {"mce_order": 4.0}, "mce_order must be an integer, got 4.0"),
        ([z] * 4, {"mce_order": float("inf")}, "mce_order must be an integer, got inf"),
        ([z] * 4, {"mce_order": "1"}, "mce_order must be an integer, got '1'"),
        ([z] * 4, {"mce_order": True}, "mce_order must be an integer, got True"),
        ([z] * 4, {"mce_mu": "1"}, "mce_mu must be a number, got '1'"),
        ([z] * 4, {"mce_mu": -1}, r"mce_mu must be in \[0, inf\), got -1"),
        ([z] * 4, {"mce_mu": 0, "logarithm": "exact"}, r"mce_mu must be in \[1e-06, inf\), got 0"),
        ([z] * 4, {"gamma": -1}, "gamma must be"),
        ([z] * 4, {"mce_lambd": -1}, "mce_lambd must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            matrix_ssl_loss(*arguments, **options)
        if arguments[0] is z and options:
            with pytest.raises(ValueError, match=message):
                MatrixSSLLoss(**options)


def test_warns_that_the_exact_logarithm_is_another_objective():
    with pytest.warns(UserWarning, match="another objective than Matrix-SSL's series"):
        matrix_ssl_loss(*_batch(6, 4), logarithm="exact")


def test_a_diverging_series_is_reported():
    views, module = [_modes(2, 8)] * 4, MatrixSSLLoss(mce_mu=1.8)  # eigenvalues 1.3 and 0.8
    with pytest.warns(
        RuntimeWarning, match=r"the series of the Matrix-SSL loss diverges: spectral radius 1\.3, above 1"
    ):
        module(*views)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):
            module(*views)
        MatrixSSLLoss(mce_mu=1.8).eval()(*views)
        MatrixSSLLoss(mce_mu=0.5)(*views)
        MatrixSSLLoss(mce_mu=1)(*_batch(6, 4))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("options", [{}, {"mce_mu": 0.5}, {"logarithm": "exact"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, options, device):
    free = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
    targets = [view.to(device, dtype) for view in difficult_views(kind, *shape, seed=1)]
    for form in ("covariance", "gram"):
        terms = matrix_ssl_terms(*free, *targets, form=form, **options)
        assert terms.loss.dtype == torch.float32 and all(term.isfinite() for term in terms)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(terms.loss, free))
        assert 0 <= terms.effective_rank <= min(shape[0], shape[1]) + 1e-3
        if kind == "zero":
            assert terms.uniformity == terms.alignment == 0
            assert all(
                (gradient == 0).all() for gradient in torch.autograd.grad(matrix_ssl_loss(*free, *targets), free)
            )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(device, dtype):
    views = [view.float().to(device, dtype) for view in _batch(512, 32)]
    with torch.autocast(device, dtype=dtype):
        loss = matrix_ssl_loss(*views)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_matrix_ssl(*(v.double().cpu() for v in views)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mce_mu": 0.5, "trace_term": True}, {"logarithm": "exact"}])
@pytest.mark.parametrize("shape", [(8, 4), (8, 32)])
def test_compiles_to_one_graph(shape, options):
    free, targets = _free(*shape)
    compiled = torch.compile(matrix_ssl_loss, fullgraph=True, backend="aot_eager")
    expected, found = matrix_ssl_loss(*free, *targets, **options), compiled(*free, *targets, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, free), torch.autograd.grad(expected, free))
