"""The SSL-EY loss."""

from torch import Tensor

from lightly_ext.collective import collective
from plugins import losses


class SSLEYLoss(losses.SSLEYLoss):
    """Implementation of the SSL-EY loss [0].

    The loss of the generalised eigenproblem behind canonical correlation analysis. It has no weights to tune, no
    negatives, no teacher, and no regulariser for collapse. It sets the scale of the embedding itself: put no
    normalisation between projection head and loss. For SGD, end the head with a ScaledLinear, as SSLEYProjectionHead
    does (lightly_ext.models.modules.heads); with a plain last layer use AdamW or LARS.

    - [0] Unconstrained Stochastic CCA: Unifying Multiview and Self-Supervised Learning, 2024,
      https://arxiv.org/abs/2310.01012

    Attributes:
        gather_distributed:
            If True, the rows of all processes make one batch, and the gradients that DistributedDataParallel averages
            are exactly those of that batch. Numbers of rows may differ between processes.
        estimator:
            How the squared norm of the covariance is estimated: "plugin" from all rows, as published, "split" from two
            halves of the batch, or "ustat", the unbiased U-statistic.
        form:
            "covariance" computes with matrices of dim x dim, "gram" with rows x rows, "auto" with the cheaper of the
            two. The value is the same.

    Examples:
        >>> # initialize loss function
        >>> import torch
        >>> from lightly_ext.loss import SSLEYLoss
        >>> loss_fn = SSLEYLoss()
        >>>
        >>> # generate embeddings of two random transforms of images
        >>> out0 = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> out1 = out0 + torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
        >>>
        >>> # calculate loss
        >>> loss = loss_fn(out0, out1)
        >>> round(loss.item(), 4)
        12.6892
    """

    def __init__(self, gather_distributed: bool = False, estimator: str = "plugin", form: str = "auto") -> None:
        """Initializes the SSLEYLoss module with the specified parameters.

        Raises:
            ValueError: If gather_distributed is True but torch.distributed is not available.
            ValueError: If estimator or form is unknown.
        """
        super().__init__(comm=collective(gather_distributed), form=form, estimator=estimator)
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Returns SSL-EY loss.

        Args:
            z_a:
                Tensor with shape (batch_size, dim).
            z_b:
                Tensor with shape (batch_size, dim).

        Returns:
            The computed SSL-EY loss.

        Raises:
            ValueError: If the shapes differ or there are fewer than two rows.
        """
        return super().forward(z_a, z_b)
