"""Check the labels of a classification against the outputs of the head, whatever source the labels come from."""

from typing import Any

from torch import Tensor, nn

from plugins.tools import labels as tools

_TORCH_LOSSES = ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss")


def takes_classes(loss: str) -> bool:
    """Whether the targets of a loss are numbers of classes.

    Args:
        loss: the configuration's ``LOSS.name``.
    """
    return "cross_entropy" in loss or loss in _TORCH_LOSSES


def check_labels_of(loss: nn.Module, task: Any, ignored: int) -> None:
    """Let a loss check its labels each time before it is computed.

    torch ends with an IndexError on the CPU, and with a failed assertion on a GPU, after which the process cannot use
    it. Labels of folders and .npy files are checked before the training (``catalog.class_count``), but a data set of
    torchvision, or ``LABEL_TYPE: sample_index``, shows its labels in the batches alone.

    Args:
        loss: of ``forward(output, target)``.
        task: VISSL's, which knows whether it trains or tests.
        ignored: the label that the loss leaves out.
    """

    def check(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        output, target = arguments
        check_labels(output, target, ignored, f"config.DATA.{'TRAIN' if task.train else 'TEST'}")

    loss.register_forward_pre_hook(check)


def check_labels(output: Tensor | list[Tensor], target: Any, ignored: int, where: str) -> None:
    """Check that each label is the number of an output.

    Args:
        output: ``[B, C]``, of one head or of each.
        target: ``[B]``, whole numbers. Labels in another form are not checked.
        ignored: the label that the loss leaves out.
        where: the section of the configuration that the labels come from, for the error.

    Raises:
        UserError: a label is below 0, or not below C.
    """
    classes = min(part.shape[-1] for part in (output if isinstance(output, list | tuple) else [output]))
    tools.check_labels(target, classes, ignored=ignored, where=where, what="the head in config.MODEL.HEAD.PARAMS")
