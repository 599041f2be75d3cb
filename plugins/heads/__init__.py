"""Projection heads: from the features of a backbone to the embedding that the loss takes."""

from plugins.heads.amdim import AMDIMHead, ResidualProjection
from plugins.heads.classifier import normalized_classifier
from plugins.heads.context import GatedContext, GRUContext, PixelCNNContext, context_network
from plugins.heads.cpc import CPCHead
from plugins.heads.dino import dino_head, dino_mlp
from plugins.heads.dissl import Heads, UnitRows, dissl_heads, issl_head
from plugins.heads.expand import ExpandDim, expand_resnet_dim
from plugins.heads.init import issl_init_, projection_init_
from plugins.heads.maps import MapHead, StackHead
from plugins.heads.mlp import mlp_head, plain_head
from plugins.heads.patches import PatchHead
from plugins.heads.ssv import (
    HEADS,
    ssv_barlow_head,
    ssv_deepcluster_head,
    ssv_dino_head,
    ssv_simclr_head,
    ssv_simsiam_head,
    ssv_swav_head,
)
from plugins.heads.two_branch import SharedHead, TwoBranchHead

__all__ = [
    "HEADS",
    "AMDIMHead",
    "CPCHead",
    "ExpandDim",
    "GRUContext",
    "GatedContext",
    "Heads",
    "MapHead",
    "PatchHead",
    "PixelCNNContext",
    "ResidualProjection",
    "SharedHead",
    "StackHead",
    "TwoBranchHead",
    "UnitRows",
    "context_network",
    "dino_head",
    "dino_mlp",
    "dissl_heads",
    "expand_resnet_dim",
    "issl_head",
    "issl_init_",
    "mlp_head",
    "normalized_classifier",
    "plain_head",
    "projection_init_",
    "ssv_barlow_head",
    "ssv_deepcluster_head",
    "ssv_dino_head",
    "ssv_simclr_head",
    "ssv_simsiam_head",
    "ssv_swav_head",
]
