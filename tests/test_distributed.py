"""Collectives: values, gradients, unequal rows, and the pool that the tests of ranks run on."""

import os

import pytest
import torch

from plugins.distributed import LOCAL, WORLD, Collective
from plugins.linalg import covariance_eigenvalues, joined_mean, standardized_rows
from plugins.testing import RankError, assert_joined, toy_views


def _sum_and_gather(comm, rows):
    rows = rows.clone().requires_grad_()
    total, joined = comm.sum(rows.sum(0)), comm.gather_rows(rows)
    weights = torch.arange(joined.numel(), dtype=rows.dtype).view_as(joined)
    ((joined * weights).sum() + (total**2).sum()).backward()
    return total.detach(), joined.detach(), rows.grad, comm.row_counts(len(rows)), (comm.size, comm.rank)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(3, 1), (2, 4, 1), (0, 3, 2)])
def test_sum_and_gather_with_unequal_rows(ranks, counts):
    rows = torch.arange(2.0 * sum(counts)).view(-1, 2)
    weights = torch.arange(rows.numel(), dtype=rows.dtype).view_as(rows)
    expected = weights + 2 * rows.sum(0)
    results = ranks.run(_sum_and_gather, [(part,) for part in rows.split(list(counts))])
    for rank, (total, joined, gradient, seen, place) in enumerate(results):
        assert torch.equal(total, rows.sum(0))
        assert torch.equal(joined, rows)
        assert torch.equal(gradient, len(counts) * expected.split(list(counts))[rank])  # W times its own part
        assert seen == list(counts)
        assert place == (len(counts), rank)


def _layouts(comm, matrix):
    total, joined = comm.sum(matrix.T), comm.gather_rows(matrix.T, counts=[matrix.shape[1]] * comm.size)
    return total.is_contiguous(), total, joined


@pytest.mark.ddp
def test_takes_transposed_tensors(ranks):
    matrix = torch.arange(6.0).view(2, 3)
    for contiguous, total, joined in ranks.run(_layouts, [(matrix,), (10 * matrix,)]):
        assert contiguous  # NCCL refuses other layouts
        assert torch.equal(total, 11 * matrix.T)
        assert torch.equal(joined, torch.cat([matrix.T, 10 * matrix.T]))


def test_alone_everything_is_the_identity():
    rows = torch.ones(2, 3)
    for comm in (LOCAL, WORLD, Collective(enabled=False)):
        assert (comm.size, comm.rank, comm.row_counts(2)) == (1, 0, [2])
        assert comm.sum(rows) is rows
        assert comm.gather_rows(rows) is rows


def _linear_step(comm, model, x):
    """Some loss of joined quantities, by both collectives."""
    z = model(x)
    return comm.sum(z.T @ z).logdet() + comm.gather_rows(z).tanh().sum()


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(2, 7), (5, 1, 3)])
def test_mean_gradient_is_that_of_the_joined_batch(ranks, counts):
    assert_joined(ranks, _linear_step, toy_views(9, 5, views=1), counts)


def _sliced_step(comm, model, x):
    """A loss of this rank's rows only: the convention's negative control."""
    return model(x).square().mean()


@pytest.mark.ddp
def test_comparison_with_the_joined_batch_notices_local_losses(ranks):
    with pytest.raises(AssertionError, match="loss, rank 0"):
        assert_joined(ranks, _sliced_step, toy_views(9, 5, views=1), (2, 7))


def _statistics(comm, rows):
    s, factor = standardized_rows(rows, comm)
    return s, float(factor), covariance_eigenvalues(rows, comm), joined_mean(rows[:, 0], comm)


@pytest.mark.ddp
@pytest.mark.parametrize("width", [3, 40])
def test_statistics_are_those_of_the_joined_rows(ranks, width):
    (rows,) = toy_views(9, width, views=1)
    s, factor, eigenvalues, mean = _statistics(LOCAL, rows)
    results = ranks.run(_statistics, [(part,) for part in rows.split([1, 6, 2])])
    torch.testing.assert_close(torch.cat([result[0] for result in results]), s)
    for _, *rest in results:
        torch.testing.assert_close(rest, [factor, eigenvalues, mean])


def _refusals(comm, rows):
    messages = []
    for function in (standardized_rows, lambda z, c: joined_mean(z[:, 0], c)):
        try:
            function(rows, comm)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.ddp
def test_too_few_rows_over_all_ranks(ranks):
    one, none = torch.ones(1, 2), torch.ones(0, 2)
    assert (
        ranks.run(_refusals, [(one,), (none,)])
        == [["a covariance needs at least 2 rows over all processes, got 1", None]] * 2
    )
    assert ranks.run(_refusals, [(one,), (one,)]) == [[None, None]] * 2
    for messages in ranks.run(_refusals, [(none,), (none,)]):
        assert messages == [
            "a covariance needs at least 2 rows over all processes, got 0",
            "a batch mean needs at least 1 rows over all processes, got 0",
        ]


def _fails_on(comm, bad_rank):
    if comm.rank == bad_rank:
        raise KeyError("the reason")
    return comm.rank


@pytest.mark.ddp
def test_pool_reports_the_failing_rank(ranks):
    with pytest.raises(RankError, match=r"rank 1: Traceback[\s\S]*the reason"):
        ranks.run(_fails_on, [(1,), (1,), (1,)])
    assert ranks.run(_fails_on, [(None,)] * 3) == [0, 1, 2]  # and goes on


def _dies(comm, bad_rank):
    if comm.rank == bad_rank:
        os._exit(1)
    return comm.sum(torch.ones(1))


@pytest.mark.ddp
@pytest.mark.slow
def test_pool_survives_a_dead_rank(ranks):
    with pytest.raises(RankError, match="died"):
        ranks.run(_dies, [(1,)] * 3)
    assert ranks.run(_dies, [(None,)] * 3) == [torch.tensor([3.0])] * 3
