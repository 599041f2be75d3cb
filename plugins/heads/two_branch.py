"""Two heads on the same features: the second one makes the targets of the first, with gradient."""

from torch import Tensor, nn

from plugins.heads.dissl import Heads


class TwoBranchHead(nn.Module):
    """What DISSL and CISSL train in place of a projection head and a teacher (Dubois et al. 2022, arXiv:2209.06235).

    Args:
        heads: the student's is applied to all views and has the form of the downstream probe; the teacher's is applied
            to the large views and is as expressive as one likes. Both take ``[B, features_dim]``.
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
        """The student's output."""
        return self.student(features)
