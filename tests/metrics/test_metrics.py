"""Metrics of representations: closed forms, streams, processes."""

import math

import pytest
import torch

from plugins.checks import NotFiniteError
from plugins.metrics import (
    MAX_WIDTH,
    Moments,
    Quality,
    QualityMonitor,
    RowSample,
    alignment,
    alpha_req,
    lidar,
    nesum,
    rankme,
    stable_rank,
    uniformity,
)


def _rows(count: int, width: int = 6, views: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Rows of several views with a large mean and unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, width, generator=generator, dtype=torch.float64) * torch.arange(1, width + 1)
    noise = [0.3 * torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(views)]
    return [100 + images + one for one in noise]


def _streamed(views: list[torch.Tensor], sizes: list[int], comm=None) -> Quality:
    quality = Quality() if comm is None else Quality(comm)
    for parts in zip(*(view.split(sizes) for view in views), strict=True):
        quality.update(list(parts))
    return quality


def _reference(views: list[torch.Tensor]) -> dict[str, float]:
    """All metrics of whole matrices, by singular values and by eigenvectors of Σ_w."""
    z, stacked = torch.cat(views), torch.stack(views)
    sigma = torch.linalg.svdvals(z)
    share = sigma / sigma.sum() + 1e-7
    centred = torch.linalg.svdvals(z - z.mean(0)) ** 2
    means = stacked.mean(0)
    deviations = (stacked - means).flatten(0, 1)
    within = deviations.T @ deviations / len(deviations) + 1e-4 * torch.eye(z.shape[1], dtype=z.dtype)
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / len(means)
    found = torch.linalg.eigvalsh(root @ between @ root)
    of_lidar = found / found.sum() + 1e-7
    units = torch.nn.functional.normalize(stacked, dim=-1)
    pairs = [(a, b) for a in range(len(views)) for b in range(a)]
    distances = torch.pdist(units[0])
    return {
        "rankme": math.exp(-(share * share.log()).sum()),
        "stable_rank": float((sigma**2).sum() / sigma[0] ** 2),
        "participation_ratio": float(centred.sum() ** 2 / (centred**2).sum()),
        "nesum": float(centred.sum() / centred[0]),
        "lidar": math.exp(-(of_lidar * of_lidar.log()).sum()),
        "alignment": sum(float((units[a] - units[b]).square().sum(1).mean()) for a, b in pairs) / len(pairs),
        "uniformity": math.log((-2 * distances**2).exp().mean()),
    }


@pytest.mark.parametrize("views", [2, 3])
def test_a_stream_equals_the_definitions_on_the_whole_matrix(views):
    rows = _rows(40, views=views)
    values = _streamed(rows, [13, 1, 20, 6]).values()._asdict()
    for name, expected in _reference(rows).items():
        # float32 rows in the sample of the uniformity; the kernel has no such limit elsewhere
        tolerance = 1e-5 if name == "uniformity" else 1e-9
        assert values[name].item() == pytest.approx(expected, rel=tolerance), name


def test_a_stream_equals_a_batch():
    rows = _rows(60)
    batch, stream = (_streamed(rows, sizes).values() for sizes in ([60], [7, 0, 1, 30, 22]))
    assert torch.allclose(torch.stack(batch), torch.stack(stream), rtol=1e-10, atol=0, equal_nan=True)


def test_a_large_mean_costs_no_digits():
    rows = [view * 1e-3 + 1e6 for view in _rows(50)]
    moments = Moments()
    for parts in zip(*(view.split(9) for view in rows), strict=True):
        moments.update(list(parts))
    exact = torch.cov(torch.cat([view - 1e6 for view in rows]).T, correction=0)
    assert torch.allclose(moments.covariance(), exact, rtol=1e-6, atol=1e-12)


def test_closed_forms_of_spectra():
    assert rankme(torch.ones(32, dtype=torch.float64)).item() == pytest.approx(32, rel=1e-4)
    # two singular values 3 and 1: the shares are 3/4 and 1/4
    assert rankme(torch.tensor([9.0, 1.0])).item() == pytest.approx(4 / 3**0.75, rel=1e-5)
    assert nesum(torch.tensor([1.0, 4.0, 3.0])).item() == stable_rank(torch.tensor([1.0, 4.0, 3.0])).item() == 2.0
    law = 7.0 * torch.arange(1, 101, dtype=torch.float64) ** -0.8
    for first, last in ((11, 50), (1, 100), (20, 1000)):
        assert alpha_req(law, first=first, last=last).item() == pytest.approx(0.8, rel=1e-10)
    assert alpha_req(law[:12]).isnan()
    assert alpha_req(torch.cat([law[:20], torch.full((80,), 1e-18).double()])).item() == pytest.approx(0.8, rel=1e-10)
    zero = torch.zeros(4, dtype=torch.float64)
    assert rankme(zero) == stable_rank(zero) == 0


def test_an_isotropic_gaussian_has_full_rank():
    z = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    values = _streamed([z], [20_000]).values()
    for value in (values.rankme, values.stable_rank, values.nesum, values.participation_ratio):
        assert value.item() == pytest.approx(8, rel=0.05)
    # independent points of the sphere in R^8: E exp(−4 + 4 cos) = e^−4 · Σ_k 16^k Γ(4) / (4^k k! Γ(4 + k))
    series = sum(4.0**k * 6 / math.factorial(k) / math.factorial(k + 3) for k in range(30))
    assert values.uniformity.item() == pytest.approx(math.log(series) - 4, abs=0.02)
    assert values.lidar.isnan() and values.alignment.isnan()


def test_lidar_of_known_scatters():
    within = torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)) - 1e-4 * torch.eye(3, dtype=torch.float64)
    between = torch.diag(torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64))
    assert lidar(between, within).item() == pytest.approx(2, rel=1e-5)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert lidar(turn @ between @ turn.T, turn @ within @ turn.T).item() == pytest.approx(2, rel=1e-5)
    # λ = 3 and 1 have the entropy of shares 3/4 and 1/4
    assert lidar(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2) * (1 - 1e-4)).item() == pytest.approx(
        4 / 3**0.75, rel=1e-4
    )
    assert lidar(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def test_lidar_of_few_views_is_that_of_the_noise_unless_their_number_is_given():
    """Images that differ in one of 20 directions, and views with equal noise in all."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4000, 1, generator=generator, dtype=torch.float64) * torch.eye(20, dtype=torch.float64)[0]
    moments = Moments()
    moments.update([images + torch.randn(4000, 20, generator=generator, dtype=torch.float64) for _ in range(2)])
    scatters = moments.between / moments.count, moments.within / moments.rows
    assert lidar(*scatters).item() == pytest.approx(math.exp(math.log(22) - 3 * math.log(3) / 22), rel=0.02)
    assert lidar(*scatters, views=2).item() < 6
    exact = torch.diag(torch.tensor([3.5, 0.5], dtype=torch.float64)), torch.eye(2, dtype=torch.float64) * 0.5
    assert lidar(*exact, views=2).item() == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match=r"views must be in \[2, inf\), got 1"):
        lidar(*exact, views=1)


def test_alignment_and_uniformity_of_known_points():
    poles = torch.tensor([[0.0, 3.0], [0.0, -1.0]])
    assert uniformity(poles).item() == pytest.approx(-8)
    assert uniformity(poles[:1]).isnan()
    assert alignment([poles, -poles]).tolist() == pytest.approx([4, 4])
    assert alignment([poles, 5 * poles, poles]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least two views, got 1"):
        alignment([poles])


def test_the_sample_depends_on_the_rows_alone():
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(4))
    samples = [RowSample(20) for _ in range(2)]
    for part in rows.split(64):
        samples[0].update(part)
    for part in rows[order].split(37):
        samples[1].update(part)
    assert torch.equal(samples[0].joined(), samples[1].joined())
    kept = (rows[:, None] == samples[0].joined()).all(2).any(1).nonzero().flatten()
    assert len(kept) == 20 and 50 < kept.float().mean() < 250  # not the first or the last rows


def test_rows_that_are_not_finite_give_nan():
    monitor = QualityMonitor(True)
    bad = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    monitor.update(features=[bad, bad], projections=[torch.eye(2), torch.eye(2)])
    values = monitor.values()
    assert all(value.isnan() for name, value in values.items() if "/features/" in name)
    assert values["quality/projections/rankme"].item() == pytest.approx(2, rel=1e-5)
    assert monitor.values() == {}
    quality = Quality()
    quality.update([bad])
    with pytest.raises(NotFiniteError, match="got NaN or inf in rows"):
        quality.values()


def test_invalid_rows_are_refused():
    quality = Quality()
    with pytest.raises(ValueError, match=f"at most {MAX_WIDTH} columns, got rows with {MAX_WIDTH + 1}"):
        quality.update([torch.zeros(1, MAX_WIDTH + 1)])
    with pytest.raises(ValueError, match="at least one row, got none"):
        quality.values()
    quality.update([torch.eye(3)])
    with pytest.raises(ValueError, match="must have 1 views of width 3, got 2 of width 3"):
        quality.update([torch.eye(3), torch.eye(3)])


def _of_ranks(comm, views, sizes):
    return [value.tolist() for value in _streamed(views, sizes, comm).values()]


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(17, 43), (5, 31, 24)])
def test_processes_give_the_values_of_one(ranks, counts):
    """The numbers of rows and the batches differ between the processes."""
    rows = _rows(60)
    alone = torch.stack(_streamed(rows, [60]).values())
    shares = zip(*(view.split(list(counts)) for view in rows), strict=True)
    arguments = [([*share], [4, count - 4]) for share, count in zip(shares, counts, strict=True)]
    for found in ranks.run(_of_ranks, arguments):
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), alone, rtol=1e-10, atol=0, equal_nan=True)
