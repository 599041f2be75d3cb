"""Options, heads and the two-view loss that several methods share."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from plugins.clock import Stepped
from plugins.distributed import Collective
from plugins.heads import HEADS, mlp_head
from plugins.losses import BYOLLossTerms, byol_terms, isoloss_terms
from plugins.predictors import MLPPredictor
from plugins.spec import Embeddings, Option


class PairTerms(NamedTuple):
    """Terms of a loss that predicts each view from the others."""

    loss: Tensor
    """The loss to minimise: the sum over all ordered pairs of views."""
    cosine: Tensor
    """Mean cosine between prediction and target over all pairs and rows, in [-1, 1]; for logging."""


def view_pairs(e: Embeddings) -> list[tuple[int, int]]:
    """Return the ordered pairs (a, b), a ≠ b, of a view a and a large view b: a predicts the target of b.

    >>> view_pairs(Embeddings(z=["z0", "z1", "z2"], p=["p0", "p1", "p2"], target=["y0", "y1"]))  # one small crop
    [(0, 1), (1, 0), (2, 0), (2, 1)]
    """
    return [(a, b) for a in range(len(e.p)) for b in range(len(e.target)) if a != b]


class CrossViewLoss(nn.Module):
    """``Σ L(p_a, y_b)`` over :func:`view_pairs`, where L is BYOL's loss, or IsoLoss with the option ``iso``.

    With two views this is L(p_0, y_1) + L(p_1, y_0). The option ``scale_loss`` multiplies it, if the method has one.
    """

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.metric, self.iso, self.comm = options["metric"], options.get("iso", False), comm
        self.scale = options.get("scale_loss", 1.0)

    def forward(self, e: Embeddings) -> PairTerms:
        """Sum the loss over all ordered pairs of views."""
        terms = [self._pair(e, a, b) for a, b in view_pairs(e)]
        loss = sum((pair.loss for pair in terms[1:]), terms[0].loss)
        similarity = sum((pair.similarity for pair in terms[1:]), terms[0].similarity)
        return PairTerms(loss * self.scale, similarity / len(terms))

    def _pair(self, e: Embeddings, a: int, b: int) -> BYOLLossTerms:
        if self.iso:
            return isoloss_terms(e.z[a], e.p[a], e.target[b], metric=self.metric, comm=self.comm)
        return byol_terms(e.p[a], e.target[b], metric=self.metric, comm=self.comm)


class ProjectingLoss(Stepped, nn.Module):
    """A loss that also applies the projection head to features of its own, before an epoch.

    Args:
        options: of the method.
        comm: the processes that share the batch.
    """

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.options, self.comm = options, comm
        self._attached: list[Any] = []  # in a list: the head is not a submodule of the loss

    def attach(self, predictor: nn.Module | None, projector: nn.Module | None) -> None:
        """Set the head."""
        self._attached = [projector]

    @property
    def projector(self) -> Any:
        """The projection head."""
        (projector,) = self._attached
        return projector


def projector_options(hidden: int, output: int) -> dict[str, Option]:
    """Return the options for the widths of the projection head."""
    return {
        "proj_hidden_dim": Option(hidden, "width of the projector's hidden layers, > 0", low=1),
        "proj_output_dim": Option(output, "width D of the embedding, > 0", low=1),
    }


def _metric_of_use_l2(use_l2: Any) -> Any:
    # any other value is passed on and fails the check of the choices
    return {True: "euclidean", False: "cosine"}.get(use_l2, use_l2)


METRIC = Option(
    "cosine",
    "distance between prediction and target: 2 - 2 cos, or the squared Euclidean distance",
    aliases={"use_l2": _metric_of_use_l2},
    choices=("cosine", "euclidean"),
)
SCALE_LOSS = Option(1.0, "factor of the loss, > 0", low=1e-6)
HEAD = Option(
    "paper",
    "projection head: the paper's, or that of Self-Supervised-Vision, which has biases and torch's initialisation",
    choices=HEADS,
)
LOG_EIGVALS = Option(False, "write the whole spectrum of the embedding's second moment once an epoch")


HALF_FEATURES = Option(False, "whether the features of all images are stored in float16 while labels are made")


def predictor_options(hidden: int, constant_lr: bool = False) -> dict[str, Option]:
    """Return the options for the width and learning rate of an MLP predictor."""
    return {
        "pred_hidden_dim": Option(hidden, "width of the predictor's hidden layer, > 0", low=1),
        "pred_lr_scale": Option(1.0, "learning rate of the predictor over that of the backbone, > 0", low=1e-6),
        "pred_lr_constant": Option(constant_lr, "the predictor keeps its learning rate, whatever the schedule"),
    }


def two_layer_head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Build BYOL's projection head: Linear, BN, ReLU, Linear."""
    return mlp_head(features_dim, options["proj_hidden_dim"], options["proj_output_dim"], layers=2)


def bottleneck_predictor(options: Mapping[str, Any], _comm: Collective) -> nn.Module:
    """Build SimSiam's prediction head, a bottleneck: Linear without bias, BN, ReLU, Linear."""
    return MLPPredictor(options["proj_output_dim"], options["pred_hidden_dim"], bias=False)


def two_layer_predictor(options: Mapping[str, Any], _comm: Collective) -> nn.Module:
    """Build BYOL's prediction head: Linear, BN, ReLU, Linear."""
    return MLPPredictor(options["proj_output_dim"], options["pred_hidden_dim"])
