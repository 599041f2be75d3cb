"""A pass over the training set yields each image exactly once over all processes."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from plugins.distributed import LOCAL, Collective
from plugins.tools.feed import WholeSet, share_buffers, shares


@pytest.mark.parametrize("size", [3, 7, 8, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_image_occurs_once_in_as_many_batches_on_each_process(size, batch_size, processes):
    of_ranks = [shares(size, batch_size, rank, processes) for rank in range(processes)]
    every = [index for batches in of_ranks for batch in batches for index in batch]
    assert sorted(every) == list(range(size))
    assert len({len(batches) for batches in of_ranks}) == 1
    assert all(batches[0][0] == rank for rank, batches in enumerate(of_ranks))
    sizes = [len(batch) for batches in of_ranks for batch in batches]
    assert min(sizes) >= 1 and max(sizes) <= batch_size + 1
    assert max(sizes) - min(sizes) <= 2


def test_fewer_images_than_processes_are_an_error():
    with pytest.raises(ValueError, match="an image for each of 3 processes, got 2"):
        shares(2, 4, 0, 3)


def _feed(**more):
    images = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 2, 2)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.0))
    kinds = {"eval": lambda: TensorDataset(images), "train": lambda: TensorDataset(images, images + 100)}
    feed = WholeSet(
        kinds, lambda item: item, lambda views: [view.flatten(1)[:, :1] for view in map(_check(network), views)],
        [network], batch_size=4, comm=LOCAL, **more,
    )  # fmt: skip
    return feed, network


def _check(network):
    def run(view):
        network(view)
        assert not torch.is_grad_enabled()
        return view

    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_the_pass_gives_features_with_their_positions(workers):
    feed, _ = _feed(workers=workers)
    state = torch.get_rng_state()
    batches = [*feed(view="train")]
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are not used"
    index = torch.cat([index for index, _ in batches])
    assert torch.equal(index, torch.arange(10))
    for view, offset in enumerate((0, 100)):
        features = torch.cat([features[view] for _, features in batches])
        assert torch.equal(features[:, 0], index.float() + offset)


class _Noise:
    """Images that are drawn anew each time, as augmentations are."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return (torch.rand(3, 2, 2) + random.random() + np.random.rand(),)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_draws_from_its_seed_and_not_from_the_numbers_of_the_run(workers):
    """The augmentations of this process or of a worker, and the dropout of the network; between batches the run's."""

    def drawn(seed):
        feed = WholeSet(
            {"train": _Noise}, lambda item: item, lambda views: [nn.functional.dropout(view) for view in views],
            network, batch_size=1, workers=workers, seed=seed, comm=LOCAL,
        )  # fmt: skip
        found = []
        for _, (view,) in feed(view="train"):
            found.append(view)
            taken.append(next_numbers())
        return torch.cat(found)

    def next_numbers():
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def passes(seeds):
        for seed_of in (torch.manual_seed, random.seed, np.random.seed):
            seed_of(5)
        return [drawn(seed) for seed in seeds]

    network, taken = [nn.Linear(1, 1)], []
    first, again, other = passes([1, 1, 2])
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({float(view.sum()) for view in first}) == 3, "each image has numbers of its own"
    numbers, taken = taken, []
    passes([])
    assert numbers == [next_numbers() for _ in numbers]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_mode_of_the_network_is_set_and_restored(mode):
    feed, network = _feed()
    network.train()
    network[1].eval()
    for _ in feed(mode=mode):
        assert network.training == network[1].training == (mode == "train")
        break
    assert network.training and not network[1].training
    assert int(network[1].num_batches_tracked) == (1 if mode == "train" else 0)


def test_an_unknown_view_is_an_error():
    with pytest.raises(ValueError, match="view must be one of"):
        next(_feed()[0](view="test"))


def _shared(comm: Collective) -> list[torch.Tensor]:
    norm = nn.BatchNorm1d(2)
    norm.running_mean += comm.rank
    norm.num_batches_tracked += comm.rank
    share_buffers([nn.Identity(), norm], comm)
    return [*norm.buffers()]


@pytest.mark.ddp
def test_all_processes_pass_with_the_batch_statistics_of_the_first(ranks):
    """DistributedDataParallel makes them equal before each forward pass of the training, not after the last one."""
    for buffers in ranks.run(_shared, [()] * ranks.size):
        assert all(torch.equal(ours, first) for ours, first in zip(buffers, nn.BatchNorm1d(2).buffers(), strict=True))
