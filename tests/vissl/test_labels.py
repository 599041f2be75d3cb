"""A label without an output of the head raises a one-line error, wherever the labels come from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plugins.tools.command import UserError
from vissl_ext.labels import add_label_check, check_labels, uses_class_labels

pytestmark = pytest.mark.vissl
OUTPUT = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 9, 7], "WHERE has the label 9, but .* has 5 outputs, for the labels 0 to 4; it needs at least 10$"),
        ([0, -1, 4], "WHERE has the label -1, but .* for the labels 0 to 4$"),
    ],
)
def test_a_label_without_an_output_raises_an_error(labels: list[int], message: str) -> None:
    for output in (OUTPUT, [torch.zeros(3, 50), OUTPUT]):
        with pytest.raises(UserError, match=message):
            check_labels(output, torch.tensor(labels), -100, "WHERE")


@pytest.mark.parametrize("target", [[0, 4, -100], [[0.5] * 5] * 3, [[9] * 5] * 3])
def test_other_labels_pass(target: list) -> None:
    check_labels(OUTPUT, torch.tensor(target), -100, "WHERE")


@pytest.mark.parametrize(("train", "split"), [(True, "TRAIN"), (False, "TEST")])
def test_a_loss_checks_the_labels_of_the_phase(train: bool, split: str) -> None:
    loss = nn.CrossEntropyLoss()
    add_label_check(loss, SimpleNamespace(train=train), -100)
    assert torch.isfinite(loss(OUTPUT, torch.tensor([0, 1, 4])))
    with pytest.raises(UserError, match=rf"config\.DATA\.{split} has the label 5"):
        loss(OUTPUT, torch.tensor([0, 1, 5]))


def test_losses_on_class_labels_are_recognised_by_name() -> None:
    yes = ("cross_entropy_multiple_output_single_target", "label_smoothing_cross_entropy", "CrossEntropyLoss")
    assert all(map(uses_class_labels, yes))
    assert not any(map(uses_class_labels, ("isoloss", "moco_loss", "BCEWithLogitsLoss")))
