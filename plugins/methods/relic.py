"""ReLIC: instance discrimination with an invariance penalty, and BYOL's networks (arXiv:2010.07922, eq. 3)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn

from plugins.clock import Clock
from plugins.distributed import Collective
from plugins.draws import distinct, step_generator
from plugins.losses import ReLICLoss, ReLICLossTerms
from plugins.losses.relic import KL, PAIRS, STOP
from plugins.methods.common import (
    LOG_EIGVALS,
    predictor_options,
    projector_options,
    two_layer_head,
    two_layer_predictor,
)
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper, predictor_hints

TARGETS = ("ema", "self")
PREDICTORS = ("mlp", "none")


def drawn_candidates(images: int, number: int, seed: int, step: int) -> Int64[Tensor, " K"]:
    """Draw distinct rows of the joined batch, the same on all processes and after a resume.

    Args:
        images: number of rows of the joined batch.
        number: how many to draw; at most all are.
        seed: of the run.
        step: number of earlier optimiser steps.

    >>> drawn_candidates(64, 10, seed=0, step=7).shape
    torch.Size([10])
    """
    return distinct(images, number, step_generator(seed, step))


class ReLICCriterion(nn.Module):
    """ReLIC's loss with the targets and the subset of candidates that the options name."""

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        names = ("temperature", "learn_temperature", "min_temperature", "alpha", "alpha_small", "kl", "stop", "pairs")
        self.loss = ReLICLoss(**{name: options[name] for name in names}, comm=comm)
        self.own_targets = options["target"] == "self"
        self.negatives, self.seed, self.comm = options["num_negatives"], options["negatives_seed"], comm
        self.clock = Clock() if self.negatives else None

    def forward(self, e: Embeddings) -> ReLICLossTerms:
        targets = e.z[: len(e.target)] if self.own_targets else e.target
        return self.loss.terms(e.p, targets, self._candidates(e.z[0]))

    def _candidates(self, z: Tensor) -> Tensor | None:
        if self.clock is None:
            return None
        images, step = sum(self.comm.row_counts(len(z), z.device)), self.clock.earlier()
        if self.negatives >= images:
            return None
        return drawn_candidates(images, self.negatives, self.seed, step).to(z.device)


class NoPredictor(nn.Module):
    """The predictions are the projections."""

    def predict(self, views: list[Tensor]) -> list[Tensor]:
        """Return the views."""
        return views


def _predictor(options: Mapping[str, Any], comm: Collective) -> nn.Module:
    return NoPredictor() if options["predictor"] == "none" else two_layer_predictor(options, comm)


def _hints(options: Mapping[str, Any]) -> Mapping[str, Hints]:
    """Return those of the predictor, and a learned temperature without weight decay, which would pull it to 1."""
    return {**predictor_hints(options), "loss": Hints(no_decay=True)}


SPEC = MethodSpec(
    name="relic",
    loss=ReLICCriterion,
    head=two_layer_head,
    predictor=_predictor,
    teacher=True,
    views=None,
    options={
        **projector_options(hidden=4096, output=256),
        "predictor": Option("mlp", "BYOL's predictor, or none", choices=PREDICTORS),
        **predictor_options(hidden=4096),
        "target": Option(
            "ema",
            "the teacher's projections, or the network's own with their gradient; then turn the teacher off, τ = 0",
            choices=TARGETS,
        ),
        "temperature": Option(0.2, "τ of the softmax, > 0; the first value if it is learned", low=1e-6),
        "learn_temperature": Option(False, "whether τ is a trained parameter; it then begins above min_temperature"),
        "min_temperature": Option(0.1, "lower bound of a learned τ, > 0", low=1e-6),
        "alpha": Option(1.0, "weight α of the invariance, >= 0", low=0),
        "alpha_small": Option(0.0, "weight of the divergence of small crops from large views, >= 0", low=0),
        "kl": Option(
            "forward",
            "divergence of each pair of large views, in one order or both, or of rows and columns of each pair",
            choices=KL,
        ),
        "stop": Option(
            "target",
            "what has no gradient in the divergence: its first argument, the first argument's entropy, or none",
            choices=STOP,
        ),
        "pairs": Option("cross", "whether a view is also compared with its own target (all)", choices=PAIRS),
        "num_negatives": Option(0, "rows of the joined batch that are candidates, drawn at each step; 0: all", low=0),
        "negatives_seed": Option(0, "seed of the draws of candidates, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    hints=_hints,
    paper=Paper("ReLIC", "Mitrovic, McWilliams, Walker, Buesing and Blundell 2021, arXiv:2010.07922, eq. 3"),
)
