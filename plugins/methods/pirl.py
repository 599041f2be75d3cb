"""PIRL: an image and its shuffled patches agree with the image's row of a memory bank (arXiv:1912.01991)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import PatchHead
from plugins.losses import PIRLLoss, PIRLLossTerms
from plugins.losses.pirl import FORMS, SAMPLINGS
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.patches import Patches
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from plugins.targets import IndexedBank

HEADS = ("linear", "mlp", "mlp_bn")
_OF_LOSS = ("num_negatives", "temperature", "patch_weight", "form", "sampling")


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        seed = options["negatives_seed"]
        bank = IndexedBank(None, options["proj_output_dim"], momentum=options["bank_momentum"], seed=seed)
        self.pirl = PIRLLoss(bank, **{name: options[name] for name in _OF_LOSS}, seed=seed, comm=comm)

    def forward(self, e: Embeddings) -> PIRLLossTerms:
        if e.index is None:
            raise ValueError("method pirl needs the positions of the images in the training set, e.index, got None")
        image, stack = e.z
        return self.pirl.terms(image, stack, e.index)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    kind = options["head"]
    hidden = None if kind == "linear" else options["proj_hidden_dim"]
    return PatchHead(features_dim, options["proj_output_dim"], options["patches"], hidden=hidden, norm=kind == "mlp_bn")


SPEC = MethodSpec(
    name="pirl",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=1,
    stacks=1,
    patches=lambda options: Patches(options["patches"]),
    indexed=True,
    options={
        **projector_options(hidden=2048, output=128),
        "head": Option(
            "mlp_bn",
            "layers for images and for each patch: one in the paper, two in VISSL's model zoo; mlp_bn starts faster",
            choices=HEADS,
        ),
        "patches": Option(9, "patches in a stack, as many as the augmentations make; 1 for a turned view, >= 1", low=1),
        "num_negatives": Option(
            4096, "negatives of each image, >= 1; 32000 in the published ImageNet runs; at most all other images", low=1
        ),
        "temperature": Option(0.1, "of the softmax, > 0; 0.07 in the paper, with form=nce", low=1e-6),
        "patch_weight": Option(
            0.5, "weight of the patches' term, the image's has the rest, in [0, 1]; 0 is NPID", low=0.0, high=1.0
        ),
        "form": Option(
            "info_nce",
            "softmax over the negatives, the paper's estimator as in VISSL, or equations 3 and 4 as printed",
            choices=FORMS,
        ),
        "sampling": Option(
            "offset", "negatives: distinct images without the own one, or as in VISSL, with repeats", choices=SAMPLINGS
        ),
        "negatives_seed": Option(0, "seed of the negatives and of the bank's first rows, >= 0", low=0),
        "bank_momentum": Option(0.5, "share of the old row in an update of the bank, in [0, 1]", low=0.0, high=1.0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("PIRL", "Misra and van der Maaten 2020, arXiv:1912.01991, eqs. 3-5"),
)
