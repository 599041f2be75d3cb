"""MoCo: contrast with a queue of a teacher's keys (He et al. 2020, arXiv:1911.05722).

The defaults are those of v2 (Chen et al. 2020, arXiv:2003.04297); ``head="linear"`` and ``temperature=0.07`` are v1.
The key is the teacher's projection of the second view. All other views are queries: the first in the papers, small
crops as well if there are any. The loss is the mean over the queries. With ``symmetric`` the first view is a key as
well, of all views but itself: the loss is the mean of both, and the keys of both views are written to the queue.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugins.distributed import Collective
from plugins.heads import plain_head
from plugins.linalg import directions
from plugins.losses import MoCoTerms, moco_terms
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from plugins.targets import RingQueue

HEADS = ("mlp", "linear")
KEYS = (1,)
"""The views that the teacher sees."""
SYMMETRIC_KEYS = (0, 1)


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.temperature, self.comm = options["temperature"], comm
        self.keys = SYMMETRIC_KEYS if options["symmetric"] else KEYS
        self.queue = RingQueue(options["queue_size"], options["proj_output_dim"])

    def forward(self, e: Embeddings) -> MoCoTerms:
        pairs = [(view, e.target[key]) for key in self.keys for number, view in enumerate(e.p) if number != key]
        # as one batch: all views have the same number of rows
        queries, keys = (torch.cat(side) for side in zip(*pairs, strict=True))
        terms = moco_terms(queries, keys, self.queue.rows, temperature=self.temperature, comm=self.comm)
        if self.training:
            self._write([e.target[key].detach() for key in self.keys])
        return terms

    def _write(self, keys: list[Tensor]) -> None:
        """Write the keys of the joined batch to the queue, view by view."""
        units = torch.stack([directions(key.to(self.queue.rows.dtype)) for key in keys], 1)
        self.queue.write(torch.cat(self.comm.gather_rows(units).unbind(1)))


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    layers = 2 if options["head"] == "mlp" else 1
    return plain_head(features_dim, options["proj_hidden_dim"], options["proj_output_dim"], layers=layers)


SPEC = MethodSpec(
    name="moco",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=True,
    views=None,
    large=2,
    options={
        **projector_options(hidden=2048, output=128),
        "head": Option("mlp", "one hidden layer (mlp, MoCo v2) or none (linear, v1)", choices=HEADS),
        "temperature": Option(0.2, "of the softmax, > 0; 0.07 in MoCo v1", low=1e-6),
        "symmetric": Option(False, "whether each of the first two views is a query of the other's key"),
        "queue_size": Option(65536, "number K of keys in the queue, >= 1, fewer than training images", low=1),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("MoCo", "He et al. 2020, arXiv:1911.05722, and Chen et al. 2020, arXiv:2003.04297"),
)
