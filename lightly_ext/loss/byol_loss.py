"""The regression loss of BYOL and DirectPred."""

from torch import Tensor

from lightly_ext.collective import collective
from plugins import losses


class BYOLLoss(losses.BYOLLoss):
    """Implementation of the loss of BYOL [0] and DirectPred [1].

    With the cosine metric it is 2 + 2 NegativeCosineSimilarity, hence in [0, 4]; the target gets no gradient. Sum it
    over both orders of the views.

    - [0] Bootstrap Your Own Latent, 2020, https://arxiv.org/abs/2006.07733
    - [1] DirectPred, 2021, https://arxiv.org/abs/2102.06810

    Attributes:
        metric:
            "cosine" or "euclidean", the distance of prediction and target.
        gather_distributed:
            If True, the mean is over the rows of all processes. That matters where their numbers of rows differ.

    Examples:
        >>> # initialize loss function
        >>> import torch
        >>> from lightly_ext.loss import BYOLLoss
        >>> loss_fn = BYOLLoss()
        >>>
        >>> # predictions of one view and the teacher's projections of the other
        >>> p0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> z1 = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>>
        >>> # calculate loss
        >>> loss_fn(p0, z1).item()
        1.0
    """

    def __init__(self, metric: str = "cosine", gather_distributed: bool = False) -> None:
        """Initializes the BYOLLoss module with the specified parameters.

        Raises:
            ValueError: If gather_distributed is True but torch.distributed is not available.
            ValueError: If metric is unknown.
        """
        super().__init__(metric=metric, comm=collective(gather_distributed))
        self.gather_distributed = gather_distributed

    def forward(self, p: Tensor, target: Tensor) -> Tensor:
        """Returns BYOL loss of one ordered pair of views.

        Args:
            p:
                Predictions with shape (batch_size, dim).
            target:
                The teacher's projections of the other view with shape (batch_size, dim).

        Returns:
            The computed BYOL loss.

        Raises:
            ValueError: If the shapes differ or there are no rows.
        """
        return super().forward(p, target)
