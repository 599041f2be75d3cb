"""Two heads on the same features: the second one makes the targets of the first, with gradient."""

from torch import Tensor, nn


class TwoBranchHead(nn.Module):
    """What DISSL and CISSL train in place of a projection head and a teacher (Dubois et al. 2022, arXiv:2209.06235).

    Args:
        student: ``[B, features_dim] → [B, D]``, applied to all views; of the form of the downstream probe.
        teacher: ``[B, features_dim] → [B, D]``, applied to the large views; as expressive as one likes.

    Example:
        >>> head = TwoBranchHead(nn.Linear(2, 3), nn.Identity())
        >>> features = nn.functional.one_hot(__import__("torch").arange(2)).float()
        >>> head(features).shape, head.teacher(features).shape
        (torch.Size([2, 3]), torch.Size([2, 2]))
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, features: Tensor) -> Tensor:
        """The student's output."""
        return self.student(features)
