"""Each loss three ways: a pure function, ``*_terms`` with the parts for logging, and an ``nn.Module``."""

from plugins.losses.amdim import AMDIMLoss, AMDIMTerms, AMDIMView, amdim_loss, amdim_nce, amdim_terms
from plugins.losses.barlow_twins import (
    BarlowTwinsLoss,
    BarlowTwinsLossTerms,
    barlow_twins_loss,
    barlow_twins_terms,
)
from plugins.losses.byol import BYOLLoss, BYOLLossTerms, byol_loss, byol_terms
from plugins.losses.cissl import CISSLLoss, CISSLTerms, cissl_loss, cissl_terms
from plugins.losses.corinfomax import CorInfoMaxLoss, CorInfoMaxLossTerms, corinfomax_loss, corinfomax_terms
from plugins.losses.cpc import CPCLoss, CPCTerms, cpc_loss, cpc_terms, non_overlapping_offsets
from plugins.losses.deepcluster import (
    DeepClusterLoss,
    DeepClusterTerms,
    cluster_weights,
    deepcluster_loss,
    deepcluster_terms,
)
from plugins.losses.deepcluster_v2 import (
    DeepClusterV2Loss,
    DeepClusterV2Terms,
    deepcluster_v2_loss,
    deepcluster_v2_terms,
)
from plugins.losses.dino import DINOLoss, DINOTerms, dino_loss, dino_terms, teacher_temperature
from plugins.losses.dissl import DISSLLoss, DISSLTerms, dissl_loss, dissl_terms
from plugins.losses.dissl_monitor import DISSLWeights, ETFMonitor, ETFTerms, StallAlarm, dissl_warmup
from plugins.losses.i_vne import IVNELoss, IVNELossTerms, i_vne_loss, i_vne_terms
from plugins.losses.isoloss import IsoLoss, IsoLossTerms, isoloss, isoloss_terms
from plugins.losses.lejepa import LeJEPALoss, LeJEPALossTerms, lejepa_loss, lejepa_terms
from plugins.losses.matrix_ssl import (
    MatrixSSLLoss,
    MatrixSSLTerms,
    matrix_ssl_loss,
    matrix_ssl_pair_terms,
    matrix_ssl_terms,
)
from plugins.losses.mec import MECLoss, MECTerms, mec_loss, mec_pair_terms, mec_terms, mec_warmup
from plugins.losses.moco import MoCoLoss, MoCoTerms, moco_loss, moco_terms
from plugins.losses.pirl import PIRLLoss, PIRLLossTerms, draw_negatives, pirl_loss, pirl_terms
from plugins.losses.rectified_lpjepa import (
    RectifiedLpJEPALoss,
    RectifiedLpJEPALossTerms,
    rectified_lpjepa_loss,
    rectified_lpjepa_terms,
)
from plugins.losses.relic import ReLICLoss, ReLICLossTerms, relic_loss, relic_terms
from plugins.losses.sela import SeLaLoss, SeLaTerms, sela_loss, sela_terms
from plugins.losses.simclr import SimCLRLoss, simclr_loss, simclr_terms
from plugins.losses.simdino import SimDINOLoss, SimDINOTerms, simdino_loss, simdino_terms
from plugins.losses.ssl_ey import SSLEYLoss, SSLEYLossTerms, ssl_ey_loss, ssl_ey_terms
from plugins.losses.swav import SwAVLoss, SwAVTerms, swav_loss, swav_terms
from plugins.losses.vicreg import VICRegLoss, VICRegLossTerms, vicreg_loss, vicreg_terms

__all__ = [
    "AMDIMLoss",
    "AMDIMTerms",
    "AMDIMView",
    "BYOLLoss",
    "BYOLLossTerms",
    "BarlowTwinsLoss",
    "BarlowTwinsLossTerms",
    "CISSLLoss",
    "CISSLTerms",
    "CPCLoss",
    "CPCTerms",
    "CorInfoMaxLoss",
    "CorInfoMaxLossTerms",
    "DINOLoss",
    "DINOTerms",
    "DISSLLoss",
    "DISSLTerms",
    "DISSLWeights",
    "DeepClusterLoss",
    "DeepClusterTerms",
    "DeepClusterV2Loss",
    "DeepClusterV2Terms",
    "ETFMonitor",
    "ETFTerms",
    "IVNELoss",
    "IVNELossTerms",
    "IsoLoss",
    "IsoLossTerms",
    "LeJEPALoss",
    "LeJEPALossTerms",
    "MECLoss",
    "MECTerms",
    "MatrixSSLLoss",
    "MatrixSSLTerms",
    "MoCoLoss",
    "MoCoTerms",
    "PIRLLoss",
    "PIRLLossTerms",
    "ReLICLoss",
    "ReLICLossTerms",
    "RectifiedLpJEPALoss",
    "RectifiedLpJEPALossTerms",
    "SSLEYLoss",
    "SSLEYLossTerms",
    "SeLaLoss",
    "SeLaTerms",
    "SimCLRLoss",
    "SimDINOLoss",
    "SimDINOTerms",
    "StallAlarm",
    "SwAVLoss",
    "SwAVTerms",
    "VICRegLoss",
    "VICRegLossTerms",
    "amdim_loss",
    "amdim_nce",
    "amdim_terms",
    "barlow_twins_loss",
    "barlow_twins_terms",
    "byol_loss",
    "byol_terms",
    "cissl_loss",
    "cissl_terms",
    "cluster_weights",
    "corinfomax_loss",
    "corinfomax_terms",
    "cpc_loss",
    "cpc_terms",
    "deepcluster_loss",
    "deepcluster_terms",
    "deepcluster_v2_loss",
    "deepcluster_v2_terms",
    "dino_loss",
    "dino_terms",
    "dissl_loss",
    "dissl_terms",
    "dissl_warmup",
    "draw_negatives",
    "i_vne_loss",
    "i_vne_terms",
    "isoloss",
    "isoloss_terms",
    "lejepa_loss",
    "lejepa_terms",
    "matrix_ssl_loss",
    "matrix_ssl_pair_terms",
    "matrix_ssl_terms",
    "mec_loss",
    "mec_pair_terms",
    "mec_terms",
    "mec_warmup",
    "moco_loss",
    "moco_terms",
    "non_overlapping_offsets",
    "pirl_loss",
    "pirl_terms",
    "rectified_lpjepa_loss",
    "rectified_lpjepa_terms",
    "relic_loss",
    "relic_terms",
    "sela_loss",
    "sela_terms",
    "simclr_loss",
    "simclr_terms",
    "simdino_loss",
    "simdino_terms",
    "ssl_ey_loss",
    "ssl_ey_terms",
    "swav_loss",
    "swav_terms",
    "teacher_temperature",
    "vicreg_loss",
    "vicreg_terms",
]
