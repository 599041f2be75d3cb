"""SwAV: a view predicts the assignment of another view to prototypes (Caron et al. 2020, arXiv:2006.09882)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugins.clock import Clock, Stepped
from plugins.distributed import Collective
from plugins.heads import UnitRows, plain_head, ssv_swav_head
from plugins.losses import SwAVTerms, swav_terms
from plugins.methods.common import HEAD, LOG_EIGVALS, SCALE_LOSS, projector_options
from plugins.predictors import Prototypes
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper
from plugins.targets import RingQueue


class _Loss(Stepped, nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.options = {name: options[name] for name in ("temperature", "epsilon", "iterations")}
        self.large, self.queue_epoch, self.comm = options["code_views"], options["queue_epoch"], comm
        self.scale = options["scale_loss"]
        self.clock = Clock()
        slots = self.large if options["queue_size"] else 0
        self.queues: Any = nn.ModuleList(
            RingQueue(options["queue_size"], options["proj_output_dim"], seed=None) for _ in range(slots)
        )
        self._prototypes: list[Any] = [None]  # in a list: it is not a submodule of the loss

    def attach(self, predictor: nn.Module | None, projector: nn.Module | None) -> None:
        """Set the prototypes with which the rows of the queue are scored."""
        self._prototypes = [predictor]

    def forward(self, e: Embeddings) -> SwAVTerms:
        self.clock()
        if len(e.target) < self.large:
            raise ValueError(
                f"code_views={self.large} needs as many large views, got {len(e.target)}; "
                "lower code_views or add large views"
            )
        queued = self.training and len(self.queues) > 0 and self._queue_has_begun()
        scores = self._queue_scores() if queued else None
        terms = swav_terms(e.p, large=self.large, **self.options, queue_scores=scores, comm=self.comm)
        if queued:
            for queue, view in zip(self.queues, e.z, strict=False):
                queue.write(view, self.comm)
        return terms._replace(loss=terms.loss * self.scale)

    def _queue_has_begun(self) -> bool:
        if not self.queue_epoch:
            return True
        epoch = self.clock.epochs()
        if epoch is None:
            raise ValueError(
                f"the queue begins in epoch {self.queue_epoch}, but the number of the epoch is unknown; call "
                "start_epoch at the start of each epoch, or set queue_epoch to 0"
            )
        return epoch >= self.queue_epoch

    @torch.no_grad()
    def _queue_scores(self) -> list[Tensor] | None:
        """Return the scores of this process's share of the rows of each queue; None until the queues are full."""
        (prototypes,) = self._prototypes
        if prototypes is None or not all(queue.full for queue in self.queues):
            return None
        return [prototypes(queue.rows[self.comm.rank :: self.comm.size]) for queue in self.queues]


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    widths = features_dim, options["proj_hidden_dim"], options["proj_output_dim"]
    if options["head"] == "ssv":
        return ssv_swav_head(*widths)
    return nn.Sequential(*plain_head(*widths, layers=options["proj_layers"], norm=options["proj_norm"]), UnitRows())


def _predictor(options: Mapping[str, Any], _comm: Collective) -> nn.Module:
    return Prototypes(options["proj_output_dim"], options["num_prototypes"], free=options["free_prototypes"])


def _hints(options: Mapping[str, Any]) -> Mapping[str, Hints]:
    return {"predictor": Hints(frozen_steps=options["freeze_prototypes_steps"])}


def swav_options(
    *, hidden: int, output: int, layers: int, norm: bool, prototypes: int, iterations: int
) -> dict[str, Option]:
    """Return the options of SwAV and SEER, which differ in their defaults."""
    return {
        **projector_options(hidden=hidden, output=output),
        "head": HEAD,
        "proj_layers": Option(layers, "number of Linear layers of the projector, >= 1", low=1),
        "proj_norm": Option(norm, "whether a batch norm follows each hidden layer of the projector"),
        "num_prototypes": Option(prototypes, "number K of prototypes, >= 2", low=2),
        "free_prototypes": Option(
            False, "whether prototypes may have any length: their directions are compared, as in Self-Supervised-Vision"
        ),
        "temperature": Option(0.1, "temperature of the predictions, > 0", low=1e-6),
        "epsilon": Option(
            0.05, "temperature of the codes, > 0; a small one makes them hard", aliases={"sk_epsilon": None}, low=1e-6
        ),
        "iterations": Option(iterations, "Sinkhorn's iterations of the codes, >= 1", aliases={"sk_iters": None}, low=1),
        "code_views": Option(2, "number of large views that have codes, the first ones, >= 1", low=1),
        "queue_size": Option(
            0, "number of earlier rows that take part in the codes, >= 0; 3840 for batches of 256", low=0
        ),
        "queue_epoch": Option(
            15, "epoch, from 0, in which the queue begins, >= 0", aliases={"epoch_queue_starts": None}, low=0
        ),
        "freeze_prototypes_steps": Option(
            313, "steps in which the prototypes stay as they are, >= 0; about one epoch in the paper's runs", low=0
        ),
        "scale_loss": SCALE_LOSS,
        "log_eigvals": LOG_EIGVALS,
    }


SPEC = MethodSpec(
    name="swav",
    loss=_Loss,
    head=_head,
    predictor=_predictor,
    teacher=False,
    views=None,
    large=2,
    options=swav_options(hidden=2048, output=128, layers=2, norm=True, prototypes=3000, iterations=3),
    paper=Paper("SwAV", "Caron et al. 2020, arXiv:2006.09882"),
    hints=_hints,
)
