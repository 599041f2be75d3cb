"""Each loss three ways: a pure function, ``*_terms`` with the parts for logging, and an ``nn.Module``."""

from plugins.losses.byol import BYOLLoss, BYOLLossTerms, byol_loss, byol_terms
from plugins.losses.isoloss import IsoLoss, IsoLossTerms, isoloss, isoloss_terms
from plugins.losses.ssl_ey import SSLEYLoss, SSLEYLossTerms, ssl_ey_loss, ssl_ey_terms

__all__ = [
    "BYOLLoss",
    "BYOLLossTerms",
    "IsoLoss",
    "IsoLossTerms",
    "SSLEYLoss",
    "SSLEYLossTerms",
    "byol_loss",
    "byol_terms",
    "isoloss",
    "isoloss_terms",
    "ssl_ey_loss",
    "ssl_ey_terms",
]
