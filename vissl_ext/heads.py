"""A head that VISSL lacks: the classifier of the linear evaluations of MoCo, SimSiam, MEC and Matrix-SSL."""

from typing import Any

from torch import Tensor, nn
from vissl.models.heads import register_model_head

from plugins.heads import normalized_classifier


def rows(batch: Tensor | list[Tensor]) -> Tensor:
    """What VISSL hands to a head as a matrix: ``[B, D]``, also with trailing axes of one, also alone in a list."""
    batch = batch[0] if isinstance(batch, list) else batch
    return batch.flatten(1)


@register_model_head("normalized_classifier")
class NormalizedClassifier(nn.Module):
    """BatchNorm without scale and shift, then a Linear layer. VISSL's ``eval_mlp`` has a norm with both.

    Args:
        model_config: VISSL's MODEL section; not used.
        in_dim: width of the trunk's features.
        classes: how many.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, model_config: Any, in_dim: int, classes: int) -> None:
        super().__init__()
        self.clf = normalized_classifier(in_dim, classes)

    def forward(self, batch: Tensor) -> Tensor:
        """``[B, in_dim]`` (or with trailing axes of one) → ``[B, classes]``."""
        return self.clf(rows(batch))
