"""Projection heads: from the features of a backbone to the embedding that the loss takes."""

from plugins.heads.classifier import normalized_classifier
from plugins.heads.dissl import Heads, dissl_heads, issl_head
from plugins.heads.expand import ExpandDim, expand_resnet_dim
from plugins.heads.init import issl_init_, projection_init_
from plugins.heads.mlp import mlp_head
from plugins.heads.patches import PatchHead
from plugins.heads.two_branch import SharedHead, TwoBranchHead

__all__ = [
    "ExpandDim",
    "Heads",
    "PatchHead",
    "SharedHead",
    "TwoBranchHead",
    "dissl_heads",
    "expand_resnet_dim",
    "issl_head",
    "issl_init_",
    "mlp_head",
    "normalized_classifier",
    "projection_init_",
]
