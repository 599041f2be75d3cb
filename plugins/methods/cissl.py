"""CISSL: contrastive learning with a linear student and an expressive teacher head (arXiv:2209.06235)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import TwoBranchHead, dissl_heads
from plugins.losses import CISSLTerms, cissl_terms
from plugins.spec import Embeddings, MethodSpec, Option, Paper

KINDS = ("cissl", "cissl_mlp", "fork_cissl")


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.temperature, self.comm = options["temperature"], comm

    def forward(self, e: Embeddings) -> CISSLTerms:
        return cissl_terms(e.z, e.target, temperature=self.temperature, comm=self.comm)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    return TwoBranchHead(dissl_heads(options["heads"], features_dim, options["proj_output_dim"]), features_dim)


SPEC = MethodSpec(
    name="cissl",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        "proj_output_dim": Option(128, "width D of the embedding, > 0", low=1),
        "heads": Option(
            "cissl",
            "teacher and student head; linear ones suit linear probes",
            choices=KINDS,
        ),
        "temperature": Option(0.07, "of the softmax, > 0; 0.1 in the published ImageNet runs", low=1e-6),
    },
    paper=Paper("CISSL", "Dubois, Hashimoto, Ermon and Liang 2022, arXiv:2209.06235"),
)
