"""Images: statistics, order, and what an item depends on."""

import pytest
import torch
from PIL import Image

from solo_ext.data import DATASETS, EpochSampler, EpochSeeded, evaluation_transform, linear_transform

pytestmark = pytest.mark.solo


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - {"custom"}))
def test_t18_evaluation_is_normalised_with_the_datasets_own_statistics(dataset):
    image = evaluation_transform(dataset)(Image.new("RGB", (256, 256), (128, 128, 128)))
    info = DATASETS[dataset]
    expected = (128 / 255 - torch.tensor(info.mean)) / torch.tensor(info.std)
    torch.testing.assert_close(image.mean((1, 2)), expected, rtol=1e-4, atol=1e-5)
    side = info.resize[1] if info.resize else 256
    assert image.shape == (3, side, side)


def test_custom_images_are_evaluated_at_the_size_they_are_trained_at():
    image = evaluation_transform("custom", 32, {"mean": [0.5] * 3, "std": [0.25] * 3})(Image.new("RGB", (90, 60)))
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image, torch.full((3, 32, 32), -2.0))


class _Draws(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, torch.rand(()).item()


def test_an_item_depends_on_seed_epoch_and_index_alone():
    data = EpochSeeded(_Draws(), seed=3)
    first = [data[20 + index] for index in range(10)]
    torch.rand(7)
    assert [data[20 + index] for index in reversed(range(10))] == first[::-1]
    assert [index for index, _ in first] == list(range(10))
    draws = {data[key][1] for key in range(40)} | {EpochSeeded(_Draws(), seed=4)[key][1] for key in range(40)}
    assert len(draws) == 80


def test_each_epoch_and_seed_has_an_order_of_its_own_and_processes_share_it():
    def order(epoch, seed=0, world=1, rank=0):
        sampler = EpochSampler(_Draws(), world, rank, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1) != [key + 10 for key in order(0)]
    assert sorted(order(2)) == list(range(20, 30))
    assert order(0) != order(0, seed=1)
    halves = [order(0, world=2, rank=rank) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(10))


def test_digits_are_never_mirrored(compose):
    names = {
        type(step).__name__
        for step in linear_transform("digits", compose("linear", "pretrained_feature_extractor=x")).transforms
    }
    assert "RandomHorizontalFlip" not in names and "RandomResizedCrop" in names
