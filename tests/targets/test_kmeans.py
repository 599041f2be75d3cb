"""k-means and whitening: a slow reference, empty clusters, shares of processes, degenerate rows."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plugins import linalg
from plugins.checks import NotFiniteError
from plugins.distributed import LOCAL
from plugins.targets import kmeans, whitened

module = importlib.import_module("plugins.targets.kmeans")


def _rows(n=120, d=5, groups=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(groups, d, generator=generator, dtype=torch.float64)
    chosen = torch.randint(groups, (n,), generator=generator)
    return (centres[chosen] + torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)


def _reference_kmeans(x, centroids, iterations, spherical):
    x, centroids = x.numpy(), centroids.numpy().copy()
    for iteration in range(iterations + 1):
        if spherical:
            labels = np.array([max(range(len(centroids)), key=lambda k, row=row: row @ centroids[k]) for row in x])
        else:
            labels = np.array([np.argmin([np.sum((row - c) ** 2) for c in centroids]) for row in x])
        if iteration == iterations:
            return centroids, labels
        for k in range(len(centroids)):
            if (labels == k).any():
                centroids[k] = x[labels == k].mean(0)
                if spherical:
                    centroids[k] /= np.linalg.norm(centroids[k])


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_equals_the_slow_reference(iterations, spherical):
    x = F.normalize(_rows(), dim=1) if spherical else _rows()
    init = x[::20].clone()
    found = kmeans(x, 6, iterations=iterations, spherical=spherical, init=init)
    centroids, labels = _reference_kmeans(x, init, iterations, spherical)
    np.testing.assert_allclose(found.centroids.numpy(), centroids, rtol=1e-10, atol=1e-12)
    assert found.labels.tolist() == labels.tolist()
    assert torch.equal(init, x[::20]), "the given centroids stay"


@pytest.fixture
def searched(monkeypatch):
    """The numbers of rows that each iteration compares with the centroids, with bounds whatever the size."""
    numbers, search = [], module._Rows._search

    def counted(rows, chosen):
        numbers.append(len(rows.x) if chosen is None else len(chosen))
        return search(rows, chosen)

    monkeypatch.setattr(module._Rows, "_search", counted)
    monkeypatch.setattr(module, "BOUNDED", 0)
    return numbers


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("most", [module.MOST, 0.4])
def test_rows_whose_cluster_cannot_change_are_not_compared_again(spherical, dtype, most, searched, monkeypatch):
    """With the smaller limit the bounds are given up in some iterations."""
    monkeypatch.setattr(module, "MOST", most)
    shares = []
    for seed in range(2):
        x = _rows(300, 4, groups=12, seed=seed)
        x = (F.normalize(x, dim=1) if spherical else x).to(dtype)
        searched.clear()
        found = kmeans(x, 12, iterations=20, spherical=spherical, init=x[:12].clone())
        assert searched[0] == 300 and len(searched) <= 21
        shares += [number / 300 for number in searched[1:]]
        centroids, labels = _reference_kmeans(x.double(), x[:12].double(), 20, spherical)
        assert found.labels.tolist() == labels.tolist()
        np.testing.assert_allclose(found.centroids.double(), centroids, rtol=1e-4 if dtype == torch.float32 else 1e-10)
    assert any(0 < share < most for share in shares) and not any(most <= share < 1 for share in shares)


def test_bounds_are_given_up_until_fewer_rows_change(searched, monkeypatch):
    x = _rows(300, 4, groups=12)
    monkeypatch.setattr(module, "MOST", 0)
    limits, follow = [], module._Rows._open

    def followed(rows, *new):
        chosen = follow(rows, *new)
        limits.append((rows.changes, rows.limit, chosen, rows.lead))
        return chosen

    monkeypatch.setattr(module._Rows, "_open", followed)
    kmeans(x, 12, init=x[:12].clone())
    assert limits and all(limit == changes / 2 and chosen is lead is None for changes, limit, chosen, lead in limits)
    assert set(searched) == {300}


def test_centroids_that_stay_end_the_comparisons(searched):
    x = torch.cat([torch.rand(50, 2), 5 + torch.rand(50, 2)])
    reports = []
    found = kmeans(x, 2, iterations=20, init=x[[0, 50]], report=lambda *pair: reports.append(pair))
    assert len(searched) <= 3 and len(reports) == 21 and reports[-1][1] == reports[5][1]
    assert found.labels.tolist() == [0] * 50 + [1] * 50


@pytest.mark.parametrize("threads", [1, 2, 6, 64])
def test_the_largest_score_is_the_first_one(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for count, columns in ((1, 5), (63, 17), (200, 33), (449, 300)):
        for dtype in (torch.float32, torch.float64):
            scores = torch.randint(-20, 20, (count, columns)).to(dtype)
            best, places = module.largest(scores)
            assert torch.equal(best, scores.amax(0))
            assert places.tolist() == scores.numpy().argmax(0).tolist()


def test_sums_by_groups_equal_sums_by_rows():
    """The first are those of a GPU."""
    rows, labels = _rows(50, 3), torch.randint(4, (50,))
    totals = torch.ones(6, 3, dtype=torch.float64)  # two of the groups have no rows
    module.add_rows(totals, labels, rows)
    torch.testing.assert_close(totals - 1, module.grouped_sums(6, labels, rows))
    module.add_rows(totals, labels, rows, sign=-1)
    torch.testing.assert_close(totals, torch.ones(6, 3, dtype=torch.float64))


@pytest.mark.parametrize("spherical", [False, True])
def test_the_mean_score_improves_in_every_iteration(spherical):
    x, seen = F.normalize(_rows(400), dim=1), []
    kmeans(x, 12, iterations=8, spherical=spherical, seed=3, report=lambda *pair: seen.append(pair))
    assert [iteration for iteration, _ in seen] == [*range(9)]
    scores = torch.tensor([score for _, score in seen])
    steps = scores.diff() if spherical else -scores.diff()
    assert steps.min() > -1e-9 and steps[0] > 0.01
    found = kmeans(x, 12, iterations=8, spherical=spherical, seed=3)
    own = found.centroids[found.labels]
    last = (x * own).sum(1) if spherical else (x - own).square().sum(1)
    assert seen[-1][1] == pytest.approx(last.mean().item(), rel=1e-10)


def test_centroids_far_from_the_origin_are_the_means():
    """The sums are in float64: a float32 sum of these rows is wrong by more than the distance of two neighbours."""
    x = torch.cat([torch.full((4096, 1), 1000.0), torch.full((4096, 1), 3000.0)]) + torch.rand(8192, 1)
    found = kmeans(x, 2, iterations=2, init=torch.tensor([[1000.0], [3000.0]]))
    means = torch.stack([x[:4096].double().mean(0), x[4096:].double().mean(0)])
    torch.testing.assert_close(found.centroids, means.float(), rtol=1e-7, atol=0)


def test_blocks_and_dtypes_change_nothing(monkeypatch):
    x = _rows(700).float()
    whole = kmeans(x, 6, iterations=4)
    monkeypatch.setattr(linalg, "CPU_SCORES", 1)  # blocks of 256 rows
    parts = kmeans(x, 6, iterations=4)
    assert torch.equal(parts.labels, whole.labels) and whole.centroids.dtype == torch.float32
    torch.testing.assert_close(parts.centroids, whole.centroids)
    halves, rounded = kmeans(x.half(), 6, iterations=4), kmeans(x.half().float(), 6, iterations=4)
    assert torch.equal(halves.labels, rounded.labels) and halves.centroids.dtype == torch.float32


def test_an_empty_cluster_takes_half_of_another():
    x = _rows(200)
    init = torch.cat([x[:3], torch.full((2, 5), 1e3, dtype=torch.float64)])
    found = kmeans(x, 5, init=init)
    assert torch.bincount(found.labels, minlength=5).min() > 0
    once = kmeans(x, 5, init=init, iterations=1).centroids
    sums = (once[3:, None] + once[None, :3]) / 2
    means = kmeans(x, 3, init=x[:3], iterations=1).centroids
    assert all((row - means).abs().sum(1).min() < 0.02 for row in once[3:]) and sums.isfinite().all()


def test_an_empty_spherical_cluster_keeps_its_centroid():
    x = F.normalize(_rows(50).abs(), dim=1)
    init = torch.cat([x[:2], -x[:1]])
    found = kmeans(x, 3, spherical=True, init=init)
    assert set(found.labels.tolist()) == {0, 1}
    torch.testing.assert_close(found.centroids[2], init[2], rtol=0, atol=1e-15)
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_draws_depend_on_the_seed_and_the_positions_alone():
    x = _rows(60)
    torch.manual_seed(5)
    one, same, other = kmeans(x, 6, seed=1), kmeans(x, 6, seed=1), kmeans(x, 6, seed=2, iterations=0)
    assert torch.equal(one.centroids, same.centroids)
    assert not torch.equal(kmeans(x, 6, seed=1, iterations=0).centroids, other.centroids)
    order = torch.randperm(60)
    shuffled = kmeans(x[order], 6, seed=1, index=order)
    torch.testing.assert_close(shuffled.centroids, one.centroids)
    assert torch.equal(shuffled.labels, one.labels[order])


def _clusters(comm, x, index, spherical):
    found = kmeans(x, 7, index=index, seed=4, spherical=spherical, comm=comm)
    return found.centroids, found.labels, whitened(x, 3, comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("parts", [[range(1, 40), range(1)], [range(0, 38, 2), range(1, 40, 2), range(38, 40, 2)],
                                   [range(40), range(0), range(0)]])  # fmt: skip
def test_shares_of_processes_have_the_clusters_of_the_whole(ranks, parts, spherical):
    """Some processes have no rows, or fewer than clusters."""
    x = _rows(40)
    centroids, labels, white = _clusters(LOCAL, x, torch.arange(40), spherical)
    indices = [torch.tensor([*part], dtype=torch.int64) for part in parts]
    results = ranks.run(_clusters, [(x[index], index, spherical) for index in indices])
    for index, (own, found, rows) in zip(indices, results, strict=True):
        torch.testing.assert_close(own, centroids, rtol=1e-10, atol=1e-12)
        assert torch.equal(found, labels[index])
        torch.testing.assert_close(rows @ rows.T, white[index] @ white[index].T, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(own, results[0][0]) for own, _, _ in results)


def _reference_whitened(x, dim):
    centred = x.numpy() - x.numpy().mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T, bias=True))
    y = centred @ vectors[:, ::-1][:, :dim] / np.sqrt(values[::-1][:dim])
    return y, y / np.linalg.norm(y, axis=1, keepdims=True)


@pytest.mark.parametrize("dim", [1, 3, 5, 9])
def test_whitening_equals_its_formula_up_to_a_rotation(dim):
    x = _rows() @ torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    white, expected = _reference_whitened(x, dim)
    np.testing.assert_allclose(white.T @ white / len(x), np.eye(min(dim, 5)), atol=1e-10)
    found = whitened(x, dim)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-8)
    shifted = whitened(x + 100, dim)
    torch.testing.assert_close(shifted @ shifted.T, found @ found.T, rtol=1e-6, atol=1e-6)


def test_whitening_leaves_out_directions_without_variance():
    x = _rows(60)
    flat = torch.cat([x, x @ torch.ones(5, 4, dtype=torch.float64)], 1)  # rank 5
    for dtype in (torch.float64, torch.float32, torch.float16):
        found = whitened(flat.to(dtype), 9)
        assert found.shape[1] in ((5,) if dtype != torch.float16 else (5, 6, 7, 8, 9))
        torch.testing.assert_close(found.norm(dim=1), torch.ones_like(found[:, 0]))
    assert torch.equal(whitened(torch.ones(4, 3), 2), torch.zeros(4, 1))
    assert torch.equal(whitened(torch.ones(1, 3), 2), torch.zeros(1, 1))


def test_degenerate_rows_have_finite_clusters():
    for x in (torch.zeros(6, 2), torch.ones(6, 2), torch.eye(2).repeat(3, 1), torch.ones(6, 2) * 1e4):
        for spherical in (False, True):
            found = kmeans(x, 4, spherical=spherical)
            assert found.centroids.isfinite().all() and found.labels.min() >= 0
    x = _rows(6)
    assert sorted(kmeans(x, 6).labels.tolist()) == [*range(6)]  # as many clusters as rows
    torch.testing.assert_close(kmeans(x, 1).centroids[0], x.mean(0))


@pytest.mark.parametrize(
    ("x", "k", "options", "message"),
    [
        (torch.zeros(3), 1, {}, r"a matrix \[N, D\] of floating-point numbers, got torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 2), 4, {}, r"k must be in \[1, 3\], got 4"),
        (torch.zeros(3, 2), 0, {}, "k must be in"),
        (torch.zeros(3, 2), 2, {"iterations": -1}, "iterations must be in"),
        (torch.zeros(3, 2), 2, {"init": torch.zeros(3, 2)}, r"init must have shape \(2, 2\), got \(3, 2\)"),
        (torch.zeros(3, 2), 2, {"index": torch.zeros(2, dtype=torch.int64)}, r"index must be int64 \[N\] with N = 3"),
        (torch.zeros(3, 2), 2, {"seed": -1}, "seed must be in"),
    ],
)
def test_mistakes_are_sentences(x, k, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x, k, **options)


def test_rows_that_are_not_finite_are_refused():
    x = torch.ones(4, 2)
    x[1, 1] = torch.inf
    for call in (lambda: kmeans(x, 2), lambda: whitened(x, 2)):
        with pytest.raises(NotFiniteError, match="finite rows"):
            call()
    with pytest.raises(ValueError, match="dim must be in"):
        whitened(torch.ones(4, 2), 0)
