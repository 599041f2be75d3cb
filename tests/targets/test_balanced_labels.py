"""Balanced labels: the published iteration, a slow log-domain reference, what underflows there, processes."""

import importlib

import numpy as np
import pytest
import torch

from plugins.checks import NotFiniteError
from plugins.distributed import LOCAL
from plugins.targets import balanced_labels
from plugins.targets.balanced_labels import assign_balanced


def _log_probabilities(rows, classes, *, scale=1.0, seed=0):
    """Return the class probabilities of clustered rows, whose plain argmax is far from balanced."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, 6, generator=generator, dtype=torch.float64) + 1
    w = torch.randn(6, classes, generator=generator, dtype=torch.float64)
    return (scale * h @ w).log_softmax(1)


def _reference_power(log_p, lamb, tol):
    """Iterate as published, on P^λ; return labels and iterations."""
    p = np.exp(log_p.numpy()) ** lamb
    n, k = p.shape
    c, iterations, error = np.full(n, 1 / n), 0, np.inf
    while error > tol:
        r = 1 / (k * (c @ p))
        new = 1 / (n * (p @ r))
        if iterations % 10 == 0:
            error = np.mean(np.abs(c / new - 1))
        c, iterations = new, iterations + 1
    return (p * r).argmax(1), iterations


def _lse(x, axis):
    largest = x.max(axis, keepdims=True)
    return np.log(np.exp(x - largest).sum(axis)) + largest.squeeze(axis)


def _reference_balanced(log_p, lamb, tol, limit=1000):
    """Iterate on the potentials, in float64; return labels, iterations and f."""
    x = lamb * log_p.numpy()
    n, k = x.shape
    g, iterations, error = np.full(n, -np.log(n)), 0, np.inf
    while error > tol and iterations < limit:
        f = -np.log(k) - _lse(x + g[:, None], 0)
        new = -np.log(n) - _lse(x + f, 1)
        if iterations % 10 == 0:
            error = np.abs(np.exp(g - new) - 1).mean()
        g, iterations = new, iterations + 1
    return (x + f).argmax(1), iterations, f


def _counts(labels, classes):
    return torch.bincount(labels, minlength=classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("lamb", "tol"), [(10.0, 1e-1), (10.0, 1e-5), (25.0, 1e-3), (25.0, 1e-5)])
def test_labels_and_iterations_are_those_of_the_published_algorithm(lamb, tol, dtype):
    for seed, (rows, classes) in enumerate([(400, 7), (300, 30), (50, 64)]):
        log_p = _log_probabilities(rows, classes, scale=0.3, seed=seed)
        labels, iterations = _reference_power(log_p, lamb, tol)
        found = assign_balanced(log_p.to(dtype), lamb=lamb, tol=tol)
        assert found.labels.tolist() == labels.tolist() and found.iterations == iterations
        assert found.error <= tol


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_equals_the_slow_reference_where_a_power_underflows(scale, dtype):
    log_p = _log_probabilities(300, 9, scale=scale)
    labels, iterations, f = _reference_balanced(log_p, 25.0, 1e-3, limit=151)
    found = assign_balanced(log_p.to(dtype), tol=1e-3, max_iter=151)
    assert found.iterations == iterations
    exact = dtype == torch.float64
    np.testing.assert_allclose(found.potentials.numpy(), f, rtol=1e-9 if exact else 1e-3)
    assert np.mean(found.labels.numpy() == labels) >= (1.0 if exact else 0.99)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["all entries", "entries that count"])
def test_entries_that_do_not_count_change_nothing(density, dtype, monkeypatch):
    """The matrix is computed again when the potentials have moved far, and smaller when they have become slow."""
    module = importlib.import_module("plugins.targets.balanced_labels")
    monkeypatch.setattr(module, "DENSITY", density)
    kept, limits, store, narrowed, above = [], [], module._Scaled._store, [], module._Sparse.above

    def counted(matrix, stored):
        store(matrix, stored)
        limits.append(matrix.limit)
        if isinstance(stored, module._Sparse):
            kept.append(len(stored.rows) / matrix.x.numel())

    def selected(matrix, *args):
        narrowed.append(above(matrix, *args))
        return narrowed[-1]

    monkeypatch.setattr(module._Scaled, "_store", counted)
    monkeypatch.setattr(module._Sparse, "above", selected)
    log_p = _log_probabilities(500, 40, scale=0.5)
    labels, iterations, f = _reference_balanced(log_p, 25.0, 1e-5)
    found = assign_balanced(log_p.to(dtype))
    assert found.labels.tolist() == labels.tolist() and found.iterations == iterations
    exact = dtype == torch.float64
    np.testing.assert_allclose(found.potentials.numpy(), f, rtol=1e-11 if exact else 1e-4)
    assert limits[0] == 40 and 4 <= limits[-1] < 20
    if density:
        assert narrowed and len(kept) == len(limits) and kept[-1] < 0.7 * kept[0] < 0.5
    else:
        assert not kept and not narrowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_class_out_of_reach_gets_its_share(dtype):
    """P^λ is 0 in the column of the class; the published code divides by zero there."""
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 2] -= 4000
    found = assign_balanced(logits.to(dtype).log_softmax(1), lamb=25.0)
    assert _counts(found.labels, 4).tolist() == pytest.approx([15] * 4, abs=1) and found.error <= 1e-5
    # a constant per class changes f only
    logits[:, 2] += 4000
    torch.testing.assert_close(found.labels, balanced_labels(logits.log_softmax(1)), rtol=0, atol=0)


def test_uniform_probabilities_end_at_once_and_few_values_of_iterations():
    found = assign_balanced(torch.full((20, 5), 0.2).log())
    assert found.iterations == 1 and found.error == pytest.approx(0, abs=1e-6)
    small = (0.01 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).log_softmax(1)
    assert assign_balanced(small).iterations == 11
    assert assign_balanced(_log_probabilities(300, 9), tol=0.0, max_iter=25).iterations == 25


def test_a_large_exponent_finds_the_optimum_of_equal_sizes():
    from scipy.optimize import linear_sum_assignment

    log_p = _log_probabilities(60, 6, scale=0.5)
    places = np.repeat(np.arange(6), 10)
    _, best = linear_sum_assignment(-log_p.numpy()[:, places])
    labels = balanced_labels(log_p, lamb=100.0, tol=1e-6, max_iter=5000)
    assert labels.tolist() == places[best].tolist()


def test_permuted_rows_and_classes_permute_the_labels():
    log_p = _log_probabilities(200, 8)
    rows, classes = (torch.randperm(n, generator=torch.Generator().manual_seed(2)) for n in log_p.shape)
    labels = balanced_labels(log_p)
    assert torch.equal(balanced_labels(log_p[rows]), labels[rows])
    assert torch.equal(classes[balanced_labels(log_p[:, classes])], labels)


def test_the_error_is_reported():
    seen = []
    found = assign_balanced(_log_probabilities(100, 5), report=lambda *pair: seen.append(pair))
    assert [iteration for iteration, _ in seen] == [*range(1, found.iterations + 1, 10)]
    assert seen[-1] == (found.iterations, found.error) and seen[0][1] > seen[-1][1]


def _labels(comm, log_p):
    found = assign_balanced(log_p, lamb=10.0, tol=1e-3, comm=comm)  # every iteration communicates
    return found.labels, found.iterations, found.potentials


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(90, 60), (100, 47, 3), (0, 149, 1)])
@pytest.mark.parametrize("offset", [0.0, -4000.0])
def test_shares_of_processes_have_the_labels_of_the_whole(ranks, counts, offset):
    """Some processes have no rows or fewer than classes, and one class needs the logarithmic step."""
    logits = _log_probabilities(150, 12)
    logits[:, 5] += offset
    log_p = logits.log_softmax(1)
    expected, iterations, potentials = _labels(LOCAL, log_p)
    results = ranks.run(_labels, [(part,) for part in log_p.split(list(counts))])
    assert torch.equal(torch.cat([labels for labels, _, _ in results]), expected)
    for _, count, f in results:
        assert count == iterations
        torch.testing.assert_close(f, potentials, rtol=1e-12, atol=1e-10)


def _failure(comm, log_p):
    try:
        balanced_labels(log_p, comm=comm)
    except NotFiniteError as error:
        return str(error)


@pytest.mark.ddp
def test_every_process_reports_a_number_that_is_not_finite(ranks):
    log_p = _log_probabilities(9, 3)
    log_p[4, 1] = torch.nan
    messages = ranks.run(_failure, [(part,) for part in log_p.split(3)])
    assert messages == ["a balanced assignment needs finite log-probabilities, got NaN or inf"] * 3


def test_one_row_one_class_and_halves():
    assert balanced_labels(torch.tensor([[-2.0, -0.1, -3.0]])).shape == (1,)
    assert balanced_labels(torch.zeros(3, 1)).tolist() == [0, 0, 0]
    log_p = _log_probabilities(80, 4).to(torch.bfloat16)
    assert torch.equal(balanced_labels(log_p), balanced_labels(log_p.float()))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.zeros(3), {}, r"a matrix \[N, K\] of floating-point numbers, got torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 0), {}, r"got torch.float32 of shape \(3, 0\)"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, "got torch.int64"),
        (torch.zeros(0, 2), {}, "at least 1 rows over all processes, got 0"),
        (torch.zeros(3, 2), {"lamb": 0.0}, "lamb must be in"),
        (torch.zeros(3, 2), {"tol": -1.0}, "tol must be in"),
        (torch.zeros(3, 2), {"max_iter": 0}, "max_iter must be in"),
        (torch.tensor([[0.0, -torch.inf]]), {}, "finite log-probabilities"),
    ],
)
def test_mistakes_are_sentences(given, options, message):
    with pytest.raises(ValueError, match=message):
        balanced_labels(given, **options)
