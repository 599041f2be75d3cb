"""CISSL: contrastive learning with a linear student and an expressive teacher head (arXiv:2209.06235).

With ``heads="simclr"`` and ``positives="other"`` it is SimCLR, as its authors trained it for comparison.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import SharedHead, TwoBranchHead, dissl_heads
from plugins.losses import CISSLTerms, cissl_terms
from plugins.losses.cissl import POSITIVES
from plugins.spec import Embeddings, MethodSpec, Option, Paper

KINDS = ("cissl", "cissl_mlp", "fork_cissl", "simclr")
ONE_HEAD = ("simclr",)
"""Values of ``heads`` with one head for both sides."""


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.temperature, self.positives, self.comm = options["temperature"], options["positives"], comm
        self.one_head = options["heads"] in ONE_HEAD

    def forward(self, e: Embeddings) -> CISSLTerms:
        targets = e.z if self.one_head else e.target
        return cissl_terms(e.z, targets, temperature=self.temperature, positives=self.positives, comm=self.comm)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    heads = dissl_heads(options["heads"], features_dim, options["proj_output_dim"])
    if options["heads"] in ONE_HEAD:
        return SharedHead(*heads.student.children())
    return TwoBranchHead(heads, features_dim)


SPEC = MethodSpec(
    name="cissl",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    large=2,
    options={
        "proj_output_dim": Option(128, "width D of the embedding, > 0", low=1),
        "heads": Option(
            "cissl",
            "teacher and student head; linear students suit linear probes; simclr is one for both sides",
            choices=KINDS,
        ),
        "positives": Option(
            "all",
            "whether a view is a positive of itself, or only the other views of its image are (all, other)",
            choices=POSITIVES,
        ),
        "temperature": Option(0.07, "of the softmax, > 0; 0.1 in the published ImageNet runs", low=1e-6),
    },
    paper=Paper("CISSL", "Dubois, Hashimoto, Ermon and Liang 2022, arXiv:2209.06235"),
)
