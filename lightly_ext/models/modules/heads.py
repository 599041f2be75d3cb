"""Projection and prediction heads in lightly's manner.

Each method has ``<Name>ProjectionHead``, and each method with a computed predictor ``<Name>PredictionHead``. The heads
of BYOL and SimSiam are lightly's own.
"""

from itertools import pairwise
from typing import Any

from lightly.models.modules import heads as _lightly
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn

from lightly_ext.collective import collective
from lightly_ext.names import CLASS_NAMES
from plugins.predictors import ClosedFormPredictor
from plugins.spec import MethodSpec


class ScaledLinear(nn.Linear):
    """Linear layer divided by the root of its input width: ``(W h + b) / sqrt(in_features)``.

    Use it as the last layer in front of a loss that does not normalise the embedding, such as SSL-EY's, which grows as
    the fourth power of the embedding. With a plain ``nn.Linear`` the curvature of such a loss grows with the width of
    the hidden layer, and SGD at a usual learning rate diverges: at 0.06 the loss of SSL-EY was 2.4e4, 1.2e25, NaN. A
    smaller initial scale alone does not help, because the curvature stays. Here the curvature does not depend on the
    width. The entries of W start uniform in ±4 / sqrt(out_features), so that the embedding starts near the scale of the
    minimum, where the sum of the two views' covariances is the identity.

    Examples:
        >>> import torch
        >>> layer = ScaledLinear(4, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(1.0)
        >>> layer(torch.ones(1, 4)).tolist()
        [[2.0, 2.0]]
    """

    def reset_parameters(self) -> None:
        """Initialise the weights, uniform in ±4 / sqrt(out_features), and the bias, zero."""
        bound = 4 * self.out_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map rows ``[B, in_features] → [B, out_features]``."""
        return super().forward(input) * self.in_features**-0.5


def scale_last_layer(head: nn.Module) -> nn.Module:
    """Replace the last Linear of a flat head by a ScaledLinear of the same shape, in place.

    Args:
        head: as of ``plugins.heads.mlp_head``. One that does not end in a Linear layer is left as it is.

    Returns:
        The head.
    """
    if isinstance(head, nn.Sequential) and len(head) and isinstance(last := head[-1], nn.Linear):
        head[-1] = ScaledLinear(last.in_features, last.out_features, bias=last.bias is not None)
    return head


class SSLEYProjectionHead(ProjectionHead):
    """Projection head used for SSL-EY.

    That of VICReg with two layers; the paper's ImageNet runs have three. Its last layer is a ScaledLinear, so that SGD
    at lightly's usual learning rate of 0.06 is stable.

    - [0]: SSL-EY, 2024, https://arxiv.org/abs/2310.01012
    """

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192, num_layers: int = 2
    ) -> None:
        """Initializes the SSLEYProjectionHead with the specified dimensions.

        Args:
            input_dim:
                Dimensionality of the input features.
            hidden_dim:
                Dimensionality of the hidden layers.
            output_dim:
                Dimensionality of the output features.
            num_layers:
                Number of linear layers, at least two.
        """
        if num_layers < 2:
            raise ValueError(f"num_layers must be at least 2, got {num_layers}")
        widths = [input_dim, *[hidden_dim] * (num_layers - 1)]
        blocks = [(before, after, nn.BatchNorm1d(after), nn.ReLU()) for before, after in pairwise(widths)]
        super().__init__([*blocks, (hidden_dim, output_dim, None, None)])
        scale_last_layer(self.layers)


class DirectPredPredictionHead(ClosedFormPredictor):
    """Prediction head used for DirectPred. It is computed from the projections and has no parameters.

    "W = U diag(p) U^T" of the running second moment of the projections. p are the square roots of its eigenvalues,
    divided by the largest. Call it once per view and step: in training each call updates the moment, then predicts; in
    evaluation it only predicts. The second moment and W are buffers and therefore in the state dict.

    - [0]: DirectPred, 2021, https://arxiv.org/abs/2102.06810

    Examples:
        >>> import torch
        >>> from lightly_ext.models.modules import DirectPredPredictionHead
        >>> prediction_head = DirectPredPredictionHead(input_dim=2)
        >>> prediction_head(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])
    """

    def __init__(
        self,
        input_dim: int = 256,
        alpha: float = 0.5,
        eps: float = 0.0,
        rho: float = 0.998,
        normalize: bool = True,
        gather_distributed: bool = False,
    ) -> None:
        """Initializes the DirectPredPredictionHead with the specified parameters.

        Args:
            input_dim:
                Dimensionality of the projections and of the predictions.
            alpha:
                Power of the eigenvalues.
            eps:
                Added to the eigenvalues, divided by the largest, before the power.
            rho:
                Weight of the former second moment at each update, in [0, 1).
            normalize:
                Whether the eigenvalues are divided by the largest.
            gather_distributed:
                If True, the second moment is that of the rows of all processes, and the same on all of them. Without
                it each process has a predictor of its own.

        Raises:
            ValueError: If gather_distributed is True but torch.distributed is not available, or a value is out of
                range.
        """
        super().__init__(
            input_dim, alpha=alpha, eps=eps, rho=rho, normalize=normalize, comm=collective(gather_distributed)
        )
        self.gather_distributed = gather_distributed

    def forward(self, x: Tensor) -> Tensor:
        """Computes the predictions.

        Args:
            x:
                Projections of shape bsz x input_dim.
        """
        if self.training:
            self.update(x)
        return super().forward(x)

    def predict(self, views: list[Tensor]) -> list[Tensor]:
        """Compute the predictions of all views of one step."""
        return [self(z) for z in views]


class IsoLossPredictionHead(DirectPredPredictionHead):
    """Prediction head used for IsoLoss, that of DirectPred.

    - [0]: IsoLoss, 2023, https://arxiv.org/abs/2212.04858
    """


class DirectCopyPredictionHead(DirectPredPredictionHead):
    """Prediction head used for DirectCopy: the second moment itself, without eigenvectors.

    - [0]: DirectCopy, 2021, https://arxiv.org/abs/2110.04947
    """

    def __init__(
        self,
        input_dim: int = 256,
        alpha: float = 1.0,
        eps: float = 0.25,
        rho: float = 0.998,
        normalize: bool = True,
        gather_distributed: bool = False,
    ) -> None:
        """Initializes the DirectCopyPredictionHead; the arguments are those of DirectPredPredictionHead."""
        super().__init__(input_dim, alpha, eps, rho, normalize, gather_distributed)


class IsoCopyPredictionHead(DirectCopyPredictionHead):
    """Prediction head used for IsoCopy, that of DirectCopy.

    - [0]: IsoLoss, 2023, https://arxiv.org/abs/2212.04858
    """


def _projection_head(name: str, spec: MethodSpec) -> type[ProjectionHead]:
    """Make the projection head of a MethodSpec as a class in lightly's manner."""
    known = spec.options

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = known["proj_hidden_dim"].default,
        output_dim: int = known["proj_output_dim"].default,
        **options: Any,
    ) -> None:
        ProjectionHead.__init__(self, [])
        widths = {"proj_hidden_dim": hidden_dim, "proj_output_dim": output_dim}
        self.layers = spec.head(input_dim, spec.resolve({**options, **widths}))

    doc = f"""Projection head used for {spec.title}.

    Args:
        input_dim:
            Dimensionality of the input features.
        hidden_dim:
            Dimensionality of the hidden layers.
        output_dim:
            Dimensionality of the output features.

    - [0]: {spec.reference}
    """
    body = {"__init__": __init__, "__doc__": doc, "__module__": __name__}
    return type(name, (ProjectionHead,), body)


for _name, _spec in CLASS_NAMES.items():
    _head = f"{_name}ProjectionHead"
    if _head in vars(_lightly):
        for _theirs in (_head, f"{_name}PredictionHead"):
            if _theirs in vars(_lightly):
                globals()[_theirs] = vars(_lightly)[_theirs]
    elif _head not in globals() and {"proj_hidden_dim", "proj_output_dim"} <= set(_spec.options):
        globals()[_head] = _projection_head(_head, _spec)

__all__ = sorted(
    _name for _name in globals() if _name.endswith(("ProjectionHead", "PredictionHead")) and _name[0] != "_"
)
