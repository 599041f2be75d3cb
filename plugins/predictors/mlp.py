"""The learned predictor of BYOL (2006.07733) and SimSiam (2011.10566)."""

from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range


class MLPPredictor(nn.Sequential):
    """The learned predictor: Linear, BatchNorm, ReLU, Linear. Input and output have the width of the projection.

    State-dict keys are ``0.*``, ``1.*``, ``3.*``, as in solo-learn.

    Args:
        dim: width of the projection and of the prediction.
        hidden_dim: width of the hidden layer: 4096 for BYOL, a bottleneck (512 of 2048) for SimSiam.
        bias: whether the first Linear layer has a bias. SimSiam has none; the BatchNorm cancels it.

    Raises:
        ValueError: a width is below 1.

    Example:
        >>> sorted(name for name, _ in MLPPredictor(4, 8, bias=False).named_parameters())
        ['0.weight', '1.bias', '1.weight', '3.bias', '3.weight']
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        check_range("dim", dim, low=1)
        check_range("hidden_dim", hidden_dim, low=1)
        super().__init__(
            nn.Linear(dim, hidden_dim, bias=bias),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, dim),
        )

    def predict(self, views: list[Float[Tensor, "_ D"]]) -> list[Float[Tensor, "_ D"]]:
        """Return one prediction per view. Each view has its own batch statistics."""
        return [self(z) for z in views]
