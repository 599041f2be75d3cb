"""The classifier of the linear evaluations of MoCo, SimSiam, MEC and Matrix-SSL as a head of VISSL."""

from typing import Any

from torch import Tensor, nn
from vissl.models.heads import register_model_head

from plugins.heads import normalized_classifier


def rows(batch: Tensor | list[Tensor]) -> Tensor:
    """Return the input of a head as a matrix ``[B, D]``. It may have trailing axes of size 1, or be a list of one."""
    batch = batch[0] if isinstance(batch, list) else batch
    return batch.flatten(1)


@register_model_head("normalized_classifier")
class NormalizedClassifier(nn.Module):
    """Batch norm without scale and shift, and a linear layer. The batch norm of VISSL's ``eval_mlp`` has both.

    Args:
        model_config: VISSL's MODEL section; not used.
        in_dim: width of the trunk's features.
        classes: number of classes.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, model_config: Any, in_dim: int, classes: int) -> None:
        super().__init__()
        self.clf = normalized_classifier(in_dim, classes)

    def forward(self, batch: Tensor) -> Tensor:
        """Map ``[B, in_dim]``, trailing axes of size 1 allowed, to ``[B, classes]``."""
        return self.clf(rows(batch))
