"""MoCo: contrast with a queue of a teacher's keys (He et al. 2020, arXiv:1911.05722).

The defaults are those of v2 (Chen et al. 2020, arXiv:2003.04297); ``head="linear"`` and ``temperature=0.07`` are v1.
The key is the teacher's projection of the second view. All other views are queries: the first in the papers, small
crops as well if there are any. The loss is the mean over the queries.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from plugins.distributed import Collective
from plugins.heads import plain_head
from plugins.linalg import directions
from plugins.losses import MoCoTerms, moco_terms
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from plugins.targets import RingQueue

HEADS = ("mlp", "linear")
KEY = 1
"""The view that the teacher sees."""


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.temperature, self.comm = options["temperature"], comm
        self.queue = RingQueue(options["queue_size"], options["proj_output_dim"])

    def forward(self, e: Embeddings) -> MoCoTerms:
        queries = [view for number, view in enumerate(e.p) if number != KEY]
        key = e.target[KEY]
        # as one batch: all views have the same number of rows
        keys = torch.cat([key] * len(queries))
        terms = moco_terms(torch.cat(queries), keys, self.queue.rows, temperature=self.temperature, comm=self.comm)
        if self.training:
            self.queue.write(directions(key.detach().to(self.queue.rows.dtype)), self.comm)
        return terms


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
        "queue_size": Option(65536, "number K of keys in the queue, >= 1", low=1),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("MoCo", "He et al. 2020, arXiv:1911.05722, and Chen et al. 2020, arXiv:2003.04297"),
)
