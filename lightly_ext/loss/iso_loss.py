"""IsoLoss."""

from torch import Tensor

from lightly_ext.collective import collective
from plugins import losses


class IsoLoss(losses.IsoLoss):
    """Implementation of IsoLoss [0].

    BYOL's loss with a gradient that skips the predictor, so that all eigenmodes of the embedding learn at one rate. Sum
    it over both orders of the views. The model of the same name is lightly_ext.models.IsoLoss.

    - [0] Implicit variance regularization in non-contrastive SSL, 2023, https://arxiv.org/abs/2212.04858

    Attributes:
        metric:
            "cosine" or "euclidean", the distance of prediction and target.
        gather_distributed:
            If True, the mean is over the rows of all processes. That matters where their numbers of rows differ.

    Examples:
        >>> # initialize loss function and the predictor, which is computed, not learned
        >>> import torch
        >>> from lightly_ext.loss import IsoLoss
        >>> from lightly_ext.models.modules import IsoLossPredictionHead
        >>> loss_fn = IsoLoss()
        >>> prediction_head = IsoLossPredictionHead(2)
        >>>
        >>> # projections of one view and the teacher's projections of the other
        >>> z0 = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> z1 = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>>
        >>> # calculate loss
        >>> p0 = prediction_head(z0)
        >>> round(loss_fn(z0, p0, z1).item(), 4)
        0.2929
    """

    def __init__(self, metric: str = "cosine", gather_distributed: bool = False) -> None:
        """Initializes the IsoLoss module with the specified parameters.

        Raises:
            ValueError: If gather_distributed is True but torch.distributed is not available.
            ValueError: If metric is unknown.
        """
        super().__init__(metric=metric, comm=collective(gather_distributed))
        self.gather_distributed = gather_distributed

    def forward(self, z: Tensor, p: Tensor, target: Tensor) -> Tensor:
        """Returns IsoLoss of one ordered pair of views.

        Args:
            z:
                Projections with shape (batch_size, dim), the only argument with a gradient.
            p:
                Their predictions with shape (batch_size, dim).
            target:
                The teacher's projections of the other view with shape (batch_size, dim).

        Returns:
            The computed IsoLoss.

        Raises:
            ValueError: If the shapes differ or there are no rows.
        """
        return super().forward(z, p, target)
