"""The ring queue: order, wrapping, batches longer than the ring, state, processes."""

import pytest
import torch

from plugins.targets import RingQueue


def _numbers(start, stop):
    return torch.arange(start, stop, dtype=torch.float32)[:, None]


def test_first_rows_are_the_same_unit_rows_everywhere():
    queue = RingQueue(5, 3)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(5))
    assert torch.equal(queue.rows, RingQueue(5, 3).rows) and not queue.full
    assert not torch.equal(queue.rows, RingQueue(5, 3, seed=1).rows)
    assert not RingQueue(5, 3, seed=None).rows.any()


@pytest.mark.parametrize("batches", [[2, 2, 2, 2], [5], [3, 0, 4], [7], [12], [3, 12, 1], [1] * 11])
def test_holds_the_latest_rows(batches):
    queue, done = RingQueue(5, 1, seed=None), 0
    for rows in batches:
        queue.write(_numbers(done + 1, done + 1 + rows))
        done += rows
        latest = range(max(done - 4, 1), done + 1)
        assert {*queue.rows.flatten().tolist()} - {0.0} == {*map(float, latest)}
        assert queue.written == done and queue.full == (done >= 5)
        for number in latest:
            assert queue.rows[(number - 1) % 5] == number


def test_continues_from_its_state():
    queue, other = RingQueue(5, 1, seed=None), RingQueue(5, 1)
    queue.write(_numbers(0, 8))
    other.load_state_dict(queue.state_dict())
    assert other.full
    for each in (queue, other):
        each.write(_numbers(8, 10).requires_grad_())
    assert torch.equal(queue.rows, other.rows) and not queue.rows.requires_grad


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="size must be in"):
        RingQueue(0, 3)
    with pytest.raises(ValueError, match=r"width 3 must have shape \[B, 3\], got \(2, 4\)"):
        RingQueue(5, 3).write(torch.zeros(2, 4))


def _written(comm, rows):
    queue = RingQueue(5, 1)
    queue.write(rows, comm)
    return queue.state_dict()


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(2, 1), (1, 0, 3), (4, 4)])
def test_rows_of_all_ranks_are_written_in_their_order(ranks, counts):
    rows = _numbers(0, sum(counts))
    expected = RingQueue(5, 1)
    expected.write(rows)
    for state in ranks.run(_written, [(part,) for part in rows.split(counts)]):
        torch.testing.assert_close(state, dict(expected.state_dict()), rtol=0, atol=0)
