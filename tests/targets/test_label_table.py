"""The labels of a training set: first labels, state, processes; and what makes them: features of a pass, progress."""

import pytest
import torch

from plugins.distributed import LOCAL
from plugins.draws import draw_seed
from plugins.targets.label_table import IGNORED, LabelTable, Progress, check_clusters, collect_features
from plugins.tools.feed import shares


def test_first_labels_are_balanced_and_of_each_clustering():
    table = LabelTable(3, 4)
    table.allocate(10)
    labels = table.read(torch.arange(10))
    assert labels.dtype == torch.int64 and labels.shape == (3, 10)
    counts = torch.stack([row.bincount(minlength=4) for row in labels])
    assert counts.min() == 2 and counts.max() == 3
    assert not torch.equal(labels[0], labels[1])
    other, seeded = LabelTable(3, 4), LabelTable(3, 4, seed=1)
    for each in (other, seeded):
        each.allocate(10)
    assert torch.equal(other.labels, table.labels) and not torch.equal(seeded.labels, table.labels)
    empty = LabelTable(1, 0)
    empty.allocate(2)
    assert empty.read(torch.tensor([1])).tolist() == [[IGNORED]]


def test_a_state_gives_the_table_its_size():
    table, restored = LabelTable(2, 3), LabelTable(2, 3)
    table.allocate(5)
    table.write(1, torch.tensor([4, 0]), torch.tensor([2, 1]))
    table.epoch.fill_(6)
    restored.load_state_dict(table.state_dict())
    restored.allocate(5)
    assert torch.equal(restored.labels, table.labels) and restored.epoch == 6
    assert restored.labels[1].tolist() == [1, IGNORED, IGNORED, IGNORED, 2]
    with pytest.raises(ValueError, match="labels are those of 5 images, but the training set has 6; continue with"):
        restored.allocate(6)


def test_mistakes_are_sentences():
    table = LabelTable(1, 2)
    with pytest.raises(ValueError, match="no labels: call allocate"):
        table.read(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"positions of the images in the training set, int64 .* got None"):
        table.read(None)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        table.read(torch.zeros(1))
    with pytest.raises(ValueError, match="num_clusters must be at most the number of training images, 5, got 6; lower"):
        check_clusters("num_clusters", 6, 5)
    check_clusters("num_clusters", 5, 5)


def _feed(rank, processes, size, seen):
    def feed(*, view="eval", mode="eval"):
        seen.append((view, mode))
        for batch in shares(size, 3, rank, processes):
            index = torch.tensor(batch)
            yield index, [index[:, None] * torch.ones(2), -index[:, None] * torch.ones(2)]

    return feed


@pytest.mark.parametrize("half", [False, True])
def test_features_of_a_pass_are_kept_once_in_their_order(half):
    for rank in range(3):
        comm, seen = type("Comm", (), {"rank": rank, "size": 3})(), []
        given = {"view": "train", "mode": "train", "half": half}
        index, features = collect_features(_feed(rank, 3, 11, seen), 11, Progress("x", LOCAL), comm, **given)
        assert index.tolist() == [*range(rank, 11, 3)] and seen == [("train", "train")]
        assert features.dtype == (torch.float16 if half else torch.float32)
        assert torch.equal(features.float(), index[:, None] * torch.ones(2))
        assert features.untyped_storage().nbytes() == len(index) * 2 * (2 if half else 4)


def test_progress_is_shown_every_ten_seconds_on_the_first_process(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 11.0, 11.0, 12.0, 30.0, 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress("sela", LOCAL)
    progress("features of images", 1, 9)
    progress("features of images", 5, 9)
    report = progress.of("iteration", 100)
    report(1, 0.5)
    report(11, 0.25)
    expected = "sela: features of images 5/9\nsela: iteration 11/100, 0.25\n"
    assert capsys.readouterr().err == expected
    other = Progress.__new__(Progress)
    other.name, other.first, other.last = "sela", False, -100.0
    other("features of images", 1, 9)
    assert capsys.readouterr().err == ""


def _write(comm, index, labels):
    table = LabelTable(2, 3)
    table.allocate(6)
    table.write(0, index, labels, comm)
    return table.labels


@pytest.mark.ddp
def test_labels_of_all_processes_are_written_on_each(ranks):
    index, labels = torch.tensor([3, 5, 0, 2]), torch.tensor([1, 0, 2, 2])
    expected = _write(LOCAL, index, labels)
    parts = zip(index.split([1, 3, 0]), labels.split([1, 3, 0]), strict=True)
    assert all(torch.equal(found, expected) for found in ranks.run(_write, [*parts]))
    assert expected[0].tolist() == [2, IGNORED, 2, 1, IGNORED, 0]


def test_seeds_of_draws_differ_by_their_numbers():
    assert len({draw_seed(a, b) for a in range(4) for b in range(4)}) == 16
