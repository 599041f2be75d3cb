"""The part of a training step that all frameworks share: embeddings, loss and logged statistics."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins.checks import NotFiniteError, check_result
from plugins.clock import Clock, Stepped
from plugins.distributed import LOCAL, Collective
from plugins.heads import SharedHead, TwoBranchHead
from plugins.losses import ETFMonitor
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, MethodSpec, Terms

PATIENCE = 1000
"""Number of micro-batches in one optimiser step after which a warning says that the step was not ended."""


def project(projector: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Project the features of each view. Each view has its own batch statistics, except in a SharedHead."""
    return projector.views(features) if isinstance(projector, SharedHead) else [projector(h) for h in features]


def embed(
    features: list[Tensor],
    projector: nn.Module,
    predict: Callable[[list[Tensor]], list[Tensor]] | None = None,
    target: list[Tensor] | None = None,
    *,
    large: int = 2,
) -> Embeddings:
    """Compute the input of the loss. Each view has its own batch statistics, except in a SharedHead.

    Args:
        features: features of the backbone, ``[B, features_dim]`` for each view, large views first.
        projector: the method's head.
        predict: function from the projections of all views to their predictions; None if p = z.
        target: the teacher's projections of the large views; None without a teacher.
        large: number of large views, which are the ones with targets.
    """
    z = project(projector, features)
    p = z if predict is None else predict(z)
    if isinstance(projector, TwoBranchHead):
        shown = features[:large]
        return Embeddings(z, p, [projector.teacher(h) for h in shown], [h.detach() for h in shown])
    return Embeddings(z, p, [view.detach() for view in z[:large]] if target is None else target)


def _by_view(embeddings: Embeddings) -> dict[str, Tensor]:
    """Return the embeddings by the names in which error messages show them."""
    parts = {"z": embeddings.z, "p": embeddings.p, "target": embeddings.target}
    if embeddings.p is embeddings.z:
        del parts["p"]
    return {f"{name} of view {number}": view for name, views in parts.items() for number, view in enumerate(views)}


class Objective(nn.Module):
    """The loss of a method, its clock and its running statistics; everything except the networks.

    The state is identical on all processes and must be saved in the checkpoint.

    Life cycle: a loop that accumulates the gradients of several micro-batches calls ``before_step`` before the first
    and ``after_step`` after the optimiser step. The micro-batches in between count as one step of a warm-up and as one
    batch of the running statistics, also of the closed-form predictor. Without these calls each batch in training mode
    is one step.

    Args:
        spec: the method.
        options: the result of ``spec.resolve``.
        comm: the processes that share a batch.
        predictor: the method's predictor. A closed-form predictor tracks the second moment of the projections. With any
            other predictor and the option ``log_eigvals``, this object tracks it for logging.
        projector: the method's head. If it has two branches, the cosines of the features are tracked for logging.
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
        self.comm = comm
        self.criterion = spec.loss(options, comm)
        self.etf: ETFMonitor | None = None
        if isinstance(projector, TwoBranchHead):
            self.etf = ETFMonitor(projector.features_dim, comm=comm)
        self.embedding_moment: RunningMoment | None = None
        if options.get("log_eigvals", False) and not isinstance(predictor, RunningMoment):
            self.embedding_moment = RunningMoment(options[spec.width], rho=0.99, comm=comm)
        # the clock of the loss, whose count is in the checkpoint, or a new one for the adapters
        clocks = [module for module in self.criterion.modules() if isinstance(module, Clock)]
        self._own_clock = None if clocks else Clock(persistent=False)
        roots = [self] if predictor is None else [self, predictor]
        # in a list: the predictor must not be registered as a submodule
        self._stepped = [part for root in roots for part in root.modules() if isinstance(part, Stepped)]
        self._micro_batches = 0

    @property
    def clock(self) -> Clock:
        """The count of optimiser steps."""
        return next(part for part in self._stepped if isinstance(part, Clock))

    @property
    def stepping(self) -> bool:
        """Whether a step is open: ``before_step`` has been called, but ``after_step`` has not."""
        return self.clock.stepping

    def before_step(self) -> None:
        """Open an optimiser step: all batches until ``after_step`` are its micro-batches. Idempotent."""
        for part in self._stepped:
            part.before_step()

    def after_step(self) -> None:
        """End the optimiser step. Call it after the optimiser. Does nothing if no step is open."""
        for part in self._stepped:
            part.after_step()
        self._micro_batches = 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.after_step()

    def forward(self, embeddings: Embeddings) -> Terms:
        """Return the loss and its parts, a NamedTuple of scalars. Only ``loss`` has a gradient.

        Raises:
            NotFiniteError: (on the CPU) an embedding holds NaN or inf; the message names the view.
        """
        if self.training and self.stepping and not torch.compiler.is_compiling():
            self._micro_batches += 1
            if self._micro_batches == PATIENCE:
                warnings.warn(
                    f"{PATIENCE} batches belong to one optimizer step so far, so warm-ups and the running second "
                    "moment do not advance; call after_step (update_momentum in lightly_ext) after each optimizer step",
                    stacklevel=3,
                )
        if self._own_clock is not None:
            self._own_clock()
        if self.embedding_moment is not None and self.training:
            self.embedding_moment.micro_batch()
            for view in embeddings.z:
                self.embedding_moment.update(view)
        try:
            terms = self.criterion(embeddings)
        except NotFiniteError:
            unknown = torch.full((), torch.nan)
            check_result("the loss", unknown, self.comm, **_by_view(embeddings))
            raise
        check_result("the loss", terms.loss, self.comm, **_by_view(embeddings))
        return terms

    def tracked_moment(self, predictor: nn.Module | None) -> RunningMoment | None:
        """Return the running second moment of the projections, or None if the method does not track it."""
        return predictor if isinstance(predictor, RunningMoment) else self.embedding_moment

    @torch.no_grad()
    def statistics(self, terms: Terms, embeddings: Embeddings) -> dict[str, Tensor]:
        """Return what every framework logs per step: the detached terms of the loss, and statistics of the embeddings.

        ``z_std`` is the standard deviation of the normalised projections over rows, averaged over columns and large
        views: 1 / sqrt(D) if they are isotropic, 0 if they have collapsed. Heads with two branches add ``cosine_pos``,
        ``cosine_neg`` and ``dist_to_etf`` of the features, see :class:`plugins.losses.ETFMonitor`.
        """
        found = {name: value.detach() for name, value in terms._asdict().items()}
        found["z_std"] = F.normalize(torch.stack(embeddings.z[: len(embeddings.target)]), dim=-1).std(dim=1).mean()
        if self.etf is not None and len(embeddings.features) > 1:
            found.update(self.etf(*embeddings.features[:2])._asdict())
        return found
