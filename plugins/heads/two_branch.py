"""Heads for losses with a gradient through both sides: two heads on the same features, or one shared head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plugins.heads.dissl import Heads


class TwoBranchHead(nn.Module):
    """The two heads that DISSL and CISSL train instead of a projection head and a teacher (arXiv:2209.06235).

    Args:
        heads: the student head is applied to all views and has the form of the downstream probe. The teacher head is
            applied to the large views and may have any form. Both take ``[B, features_dim]``.
        features_dim: width of the features.

    Example:
        >>> import torch
        >>> head = TwoBranchHead(Heads(teacher=nn.Identity(), student=nn.Linear(2, 3)), 2)
        >>> head(torch.eye(2)).shape, head.teacher(torch.eye(2)).shape
        (torch.Size([2, 3]), torch.Size([2, 2]))
    """

    def __init__(self, heads: Heads, features_dim: int) -> None:
        super().__init__()
        self.teacher, self.student = heads
        self.features_dim = features_dim

    def forward(self, features: Tensor) -> Tensor:
        """Return the output of the student head."""
        return self.student(features)


class SharedHead(nn.Sequential):
    """One head for both sides of a loss. All views of a batch pass through it together and share batch statistics.

    References: SimCLR (Chen et al. 2020, arXiv:2002.05709), and the code of Dubois et al. (2022, arXiv:2209.06235).

    Example:
        >>> head = SharedHead(nn.BatchNorm1d(1, affine=False, eps=1e-9))
        >>> [view.flatten().round(decimals=4).tolist() for view in head.views([torch.zeros(2, 1), torch.ones(2, 1)])]
        [[-1.0, -1.0], [1.0, 1.0]]
    """

    def views(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project the features of all views in one pass; return one matrix per view."""
        return list(self(torch.cat([*features])).split([len(view) for view in features]))
