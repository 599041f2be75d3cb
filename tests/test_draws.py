"""Draws: each sample with the same probability, whichever way it is drawn; the seeds of runs and steps."""

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch

from plugins.draws import distinct, step_generator


@pytest.mark.parametrize(("size", "count"), [(17, 2), (5, 3)])
def test_each_ordered_sample_has_the_same_probability(size, count):
    """Small samples are drawn by rejection, others from a permutation."""
    samples, trials = [*itertools.permutations(range(size), count)], 8000
    generator = step_generator(0, 0)
    counts = Counter(tuple(distinct(size, count, generator).tolist()) for _ in range(trials))
    assert set(counts) <= set(samples)
    expected = trials / len(samples)
    chi_square = sum((counts[sample] - expected) ** 2 for sample in samples) / expected
    freedom = len(samples) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("size", "count"), [(9, 1), (1000, 124), (20_000, 2400), (1_281_166, 32_000)])
def test_numbers_are_distinct_even_and_cheap(size, count):
    with mock.patch("torch.randperm", side_effect=AssertionError("time and memory would grow with the size")):
        drawn = [distinct(size, count, step_generator(0, step)) for step in range(3)]
    for each in drawn:
        assert len(each) == len(each.unique()) == count and each.min() >= 0 and each.max() < size
        if count > 1000:
            tenths = (each * 10 // size).bincount(minlength=10)
            assert (tenths - count / 10).abs().max() < 5 * (count / 10) ** 0.5
            halves = each.double().split(count // 2)[:2]  # small numbers do not come first
            assert abs(halves[0].mean() - halves[1].mean()) < 5 * size / (12 * count / 4) ** 0.5
    assert not torch.equal(drawn[0], drawn[1])


def test_repetitions_beyond_the_reserve_are_drawn_again():
    """The numbers that come first are those that come first in a longer draw."""
    with mock.patch(
        "torch.randint", side_effect=[torch.tensor([4, 4, 4]), torch.tensor([4, 9]), torch.tensor([9, 1, 3])]
    ):
        assert distinct(100, 3, step_generator(0, 0)).tolist() == [4, 9, 1]


def test_at_most_all_numbers_are_drawn():
    assert distinct(4, 9, step_generator(0, 0)).sort().values.tolist() == [0, 1, 2, 3]
    assert distinct(1, 1, step_generator(0, 0)).tolist() == [0]


def test_runs_and_steps_have_draws_of_their_own():
    """A linear function of both would give run 1 the draws that run 0 has a million steps later."""
    pairs = [(seed, step) for seed in (0, 1, 2, 10**9) for step in (0, 1, 2, 1_000_003, 2**32)]
    first = {tuple(torch.rand(2, generator=step_generator(*pair)).tolist()) for pair in pairs}
    assert len(first) == len(pairs)
    assert torch.equal(distinct(50, 5, step_generator(3, 7)), distinct(50, 5, step_generator(3, 7)))
