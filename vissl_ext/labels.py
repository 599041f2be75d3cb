"""Check the class labels of each batch against the number of outputs of the head."""

from typing import Any

from torch import Tensor, nn

from plugins.tools import labels as tools

_TORCH_LOSSES = ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss")


def uses_class_labels(loss: str) -> bool:
    """Return whether the targets of a loss are class labels.

    Args:
        loss: ``LOSS.name`` of the configuration.
    """
    return "cross_entropy" in loss or loss in _TORCH_LOSSES


def add_label_check(loss: nn.Module, task: Any, ignored: int) -> None:
    """Register a forward pre-hook on a loss that checks the labels.

    For a label out of range torch raises an IndexError on the CPU. On a GPU an assertion fails, after which the process
    cannot use the GPU. Labels from folders and .npy files are checked before training (``catalog.class_count``); those
    of torchvision data sets and of ``LABEL_TYPE: sample_index`` are known only from the batches.

    Args:
        loss: module with ``forward(output, target)``.
        task: VISSL's task.
        ignored: the label that the loss ignores.
    """

    def check(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        output, target = arguments
        check_labels(output, target, ignored, f"config.DATA.{'TRAIN' if task.train else 'TEST'}")

    loss.register_forward_pre_hook(check)


def check_labels(output: Tensor | list[Tensor], target: Any, ignored: int, where: str) -> None:
    """Check that each label is in [0, C).

    Args:
        output: ``[B, C]``, or a list with the outputs of several heads.
        target: ``[B]``, integers. Labels of another type or shape are not checked.
        ignored: the label that the loss ignores.
        where: the section of the configuration that defines the labels, for the error message.

    Raises:
        UserError: a label is out of range.
    """
    classes = min(part.shape[-1] for part in (output if isinstance(output, list | tuple) else [output]))
    tools.check_labels(target, classes, ignored=ignored, where=where, what="the head in config.MODEL.HEAD.PARAMS")
