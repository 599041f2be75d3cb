"""Check the labels of a classification against the outputs of the classifier."""

from typing import Any

from torch import Tensor

from plugins.tools.command import UserError


def check_labels(target: Any, classes: int, *, ignored: int, where: str, what: str) -> None:
    """Check that each label is the number of an output.

    torch ends with an IndexError on the CPU, and with a failed assertion on a GPU, after which the process cannot use
    it. The check reads the labels: call it while they are on the CPU, or where waiting for the device does no harm.

    Args:
        target: ``[B]``, integers. Labels of another shape or type are not checked.
        classes: number of outputs.
        ignored: the label that the loss leaves out.
        where: the source of the labels, for the error message.
        what: the classifier, for the error message.

    Raises:
        UserError: a label is below 0, or not below ``classes``.

    >>> import torch
    >>> check_labels(torch.tensor([0, 2, -100]), 3, ignored=-100, where="the batch", what="the head")
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or target.ndim != 1:
        return
    wrong = target[(target != ignored) & ((target < 0) | (target >= classes))]
    if len(wrong):
        label = int(wrong[0])
        needed = f"; it needs at least {int(wrong.max()) + 1}" if label >= classes else ""
        raise UserError(
            f"{where} has the label {label}, but {what} has {classes} outputs, "
            f"for the labels 0 to {classes - 1}{needed}"
        )
