"""The part of a training step that is the same in every framework: embeddings, loss, and what is logged of them."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins.clock import Clock, Stepped
from plugins.distributed import LOCAL, Collective
from plugins.heads import SharedHead, TwoBranchHead
from plugins.losses import ETFMonitor
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, MethodSpec, Terms

PATIENCE = 1000
"""Micro-batches of one optimiser step before a warning that the step has not been ended."""


def project(projector: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Features of each view → projections of each, with batch statistics of its own unless a SharedHead makes them."""
    return projector.views(features) if isinstance(projector, SharedHead) else [projector(h) for h in features]


def embed(
    features: list[Tensor],
    projector: nn.Module,
    predict: Callable[[list[Tensor]], list[Tensor]] | None = None,
    target: list[Tensor] | None = None,
    *,
    large: int = 2,
) -> Embeddings:
    """What the loss looks at. Each view has its own batch statistics in projector and predictor; in a SharedHead all
    have the same.

    Args:
        features: of the backbone, ``[B, features_dim]`` for each view, those of the large views first.
        projector: the method's head.
        predict: projections of all views → predictions of all views; None where p = z.
        target: the teacher's projections of the large views; None without a teacher.
        large: how many views are large: those that make targets.
    """
    z = project(projector, features)
    p = z if predict is None else predict(z)
    if isinstance(projector, TwoBranchHead):
        shown = features[:large]
        return Embeddings(z, p, [projector.teacher(h) for h in shown], [h.detach() for h in shown])
    return Embeddings(z, p, [view.detach() for view in z[:large]] if target is None else target)


class Objective(nn.Module):
    """The loss of a method with all that belongs to it but the networks: the clock, and the running statistics.

    Its state is the same on all processes and belongs in the checkpoint.

    Life cycle: a loop that accumulates the gradients of several micro-batches calls ``before_step`` before the first of
    them and ``after_step`` after the optimiser's step. All micro-batches in between count as one step of warm-ups, and
    as one batch in the running statistics, the closed-form predictor's included. Without these calls each batch in
    training mode is one step.

    Args:
        spec: the method.
        options: of ``spec.resolve``.
        comm: the processes that share a batch.
        predictor: the method's predictor. A closed-form one follows the embedding's second moment anyway; with the
            option ``log_eigvals`` and another predictor it is followed here, for the log alone.
        projector: the method's head. Where it has two branches, the cosines of the features are followed, for the log.
    """

    def __init__(
        self,
        spec: MethodSpec,
        options: Mapping[str, Any],
        comm: Collective = LOCAL,
        predictor: nn.Module | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.criterion = spec.loss(options, comm)
        self.etf: ETFMonitor | None = None
        if isinstance(projector, TwoBranchHead):
            self.etf = ETFMonitor(projector.features_dim, comm=comm)
        self.embedding_moment: RunningMoment | None = None
        if options.get("log_eigvals", False) and not isinstance(predictor, RunningMoment):
            self.embedding_moment = RunningMoment(options[spec.width], rho=0.99, comm=comm)
        # the loss's own, whose count is in the checkpoint, or one for the adapters
        clocks = [module for module in self.criterion.modules() if isinstance(module, Clock)]
        self._own_clock = None if clocks else Clock(persistent=False)
        roots = [self] if predictor is None else [self, predictor]
        # in a list: the predictor is the caller's
        self._stepped = [part for root in roots for part in root.modules() if isinstance(part, Stepped)]
        self._micro_batches = 0

    @property
    def clock(self) -> Clock:
        """The count of optimiser steps."""
        return next(part for part in self._stepped if isinstance(part, Clock))

    @property
    def stepping(self) -> bool:
        """Whether a step is open: ``before_step`` was called, and ``after_step`` not yet."""
        return self.clock.stepping

    def before_step(self) -> None:
        """Open an optimiser step: the batches until ``after_step`` are its micro-batches. Idempotent."""
        for part in self._stepped:
            part.before_step()

    def after_step(self) -> None:
        """End the optimiser step; call it after the optimiser's. Does nothing while no step is open."""
        for part in self._stepped:
            part.after_step()
        self._micro_batches = 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.after_step()

    def forward(self, embeddings: Embeddings) -> Terms:
        """The loss and its parts, a NamedTuple of scalars, of which ``loss`` has a gradient."""
        if self.training and self.stepping and not torch.compiler.is_compiling():
            self._micro_batches += 1
            if self._micro_batches == PATIENCE:
                warnings.warn(
                    f"{PATIENCE} batches belong to one optimizer step so far, so that warm-ups and the running second "
                    "moment stand still; call after_step (update_momentum in lightly_ext) after each optimizer step",
                    stacklevel=3,
                )
        if self._own_clock is not None:
            self._own_clock()
        if self.embedding_moment is not None and self.training:
            self.embedding_moment.micro_batch()
            for view in embeddings.z:
                self.embedding_moment.update(view)
        return self.criterion(embeddings)

    def followed(self, predictor: nn.Module | None) -> RunningMoment | None:
        """What follows the embedding's second moment, the predictor or ourselves, if anything does."""
        return predictor if isinstance(predictor, RunningMoment) else self.embedding_moment

    @torch.no_grad()
    def statistics(self, terms: Terms, embeddings: Embeddings) -> dict[str, Tensor]:
        """What every framework logs of a step: the loss's terms by name, detached, and how the embeddings lie.

        ``z_std`` is the standard deviation over the rows of the normalised projections, mean over their columns and
        views: 1 / sqrt(D) where they are isotropic, 0 where they have collapsed. With two branches ``cosine_pos``,
        ``cosine_neg`` and ``dist_to_etf`` are those of the features, see :class:`plugins.losses.ETFMonitor`.
        """
        found = {name: value.detach() for name, value in terms._asdict().items()}
        found["z_std"] = F.normalize(torch.stack(embeddings.z), dim=-1).std(dim=1).mean()
        if self.etf is not None and len(embeddings.features) > 1:
            found.update(self.etf(*embeddings.features[:2])._asdict())
        return found
