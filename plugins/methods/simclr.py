"""SimCLR: one head for all views, and the other views of the batch as negatives (arXiv:2002.05709).

``method: cissl`` with ``heads="simclr"`` and ``positives="other"`` has the same loss, and the head of CISSL's authors.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import SharedHead, mlp_head, ssv_simclr_head
from plugins.losses import CISSLTerms, simclr_terms
from plugins.methods.common import HEAD, LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.temperature, self.comm = options["temperature"], comm

    def forward(self, e: Embeddings) -> CISSLTerms:
        return simclr_terms(e.z, temperature=self.temperature, comm=self.comm)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Build Linear, BN, ReLU, Linear, BN without biases; all views pass through it together, as published."""
    widths = features_dim, options["proj_hidden_dim"], options["proj_output_dim"]
    if options["head"] == "ssv":
        return ssv_simclr_head(*widths)
    return SharedHead(*mlp_head(*widths, bias=False, final_norm="affine", final_bias=False).children())


SPEC = MethodSpec(
    name="simclr",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=128),
        "head": HEAD,
        "temperature": Option(0.5, "of the softmax, > 0; 0.1 in the published ImageNet runs", low=1e-6),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("SimCLR", "Chen, Kornblith, Norouzi and Hinton 2020, arXiv:2002.05709, eq. 1"),
)
