"""CPC: the context of the patches above predicts the patches below (arXiv:1807.03748, arXiv:1905.09272)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import CPCHead
from plugins.heads.context import CONTEXTS
from plugins.heads.cpc import DIRECTIONS
from plugins.losses import CPCLoss, CPCTerms, non_overlapping_offsets
from plugins.losses.cpc import REDUCTIONS
from plugins.norms import NORMS, per_sample_norm_
from plugins.patches import EVAL_INPUTS, Patches
from plugins.spec import Embeddings, MethodSpec, Option, Paper

SCORES = ("projected", "bilinear")
_SCALES = {"projected": 0.1, "bilinear": 1.0}


def offsets(options: Mapping[str, Any]) -> list[int]:
    """Return the offsets k of the predicted rows.

    Args:
        options: of the method.

    Raises:
        ValueError: there are none.

    >>> offsets({"grid": 7, "patch": 64, "stride": 32, "skip_rows": -1, "predict_rows": 5})
    [2, 3, 4, 5, 6]
    """
    grid, skip, most = options["grid"], options["skip_rows"], options["predict_rows"]
    if skip < 0:
        return non_overlapping_offsets(grid, options["patch"], options["stride"], most=most)
    found = [*range(skip + 1, grid)][:most]
    if not found:
        raise ValueError(f"skip_rows must be at most grid - 2 = {grid - 2}, so that a row is left, got {skip}")
    return found


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        scale = options["scale"] or _SCALES[options["score"]]
        negatives = options["num_negatives"] or "all"
        self.offsets, self.directions = offsets(options), options["directions"]
        seed, reduction = options["negatives_seed"], options["reduction"]
        self.cpc = CPCLoss(scale=scale, negatives=negatives, reduction=reduction, seed=seed, comm=comm)

    def forward(self, e: Embeddings) -> CPCTerms:
        if len(e.maps) != 1:
            raise ValueError(f"method cpc needs the grid of one stack of patches, e.maps, got {len(e.maps)} of them")
        targets, *predictions = e.maps[0]
        pairs = [
            ({k: of_offset[:, d] for k, of_offset in zip(self.offsets, predictions, strict=True)}, targets[:, d])
            for d in range(self.directions)
        ]
        return self.cpc.terms(pairs)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    return CPCHead(
        features_dim,
        options["proj_output_dim"] if options["score"] == "projected" else None,
        grid=options["grid"],
        offsets=offsets(options),
        context=options["context"],
        hidden=options["context_hidden_dim"],
        directions=options["directions"],
    )


def _prepare(options: Mapping[str, Any], backbone: nn.Module) -> nn.Module:
    return per_sample_norm_(backbone) if options["norm"] == "per_sample" else backbone


def _eval_patches(options: Mapping[str, Any]) -> tuple[int, int] | None:
    return (options["patch"], options["stride"]) if options["eval_input"] == "patches" else None


SPEC = MethodSpec(
    name="cpc",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=0,
    stacks=1,
    patches=lambda options: Patches(options["grid"] ** 2, options["patch"], options["stride"]),
    options={
        "grid": Option(7, "patches per side of the grid, G; the stack has G x G patches, >= 2", low=2),
        "patch": Option(64, "side of a patch in pixels, as in the augmentations, >= 1", low=1),
        "stride": Option(32, "distance of neighbouring patches in pixels, as in the augmentations, >= 1", low=1),
        "skip_rows": Option(
            -1, "rows after the context's own that are not predicted; -1: those that overlap with it", low=-1
        ),
        "predict_rows": Option(5, "largest number of predicted rows, >= 1", low=1),
        "directions": Option(
            1, "directions of prediction: down, and up, and to both sides", choices=DIRECTIONS, low=1, high=4
        ),
        "context": Option("pixelcnn", "network of the context: of CPC v2, or one of two of v1", choices=(*CONTEXTS,)),
        "context_hidden_dim": Option(256, "hidden width of the pixelcnn, >= 1", low=1),
        "score": Option(
            "projected", "<p, W z> of width proj_output_dim as in CPC v2, or z W_k c as in v1", choices=SCORES
        ),
        "proj_output_dim": Option(64, "width D of targets and predictions, >= 1; only with score=projected", low=1),
        "scale": Option(0.0, "factor of the scores; 0 is 0.1 with score=projected and 1 with score=bilinear", low=0.0),
        "num_negatives": Option(0, "locations that are drawn as negatives; 0: all of the joined batch", low=0),
        "negatives_seed": Option(0, "seed of drawn negatives, >= 0", low=0),
        "reduction": Option("mean", "of the offsets; sum in the papers", choices=REDUCTIONS),
        "norm": Option(
            "batch", "normalisation of the backbone: as it is, or each image by itself (GroupNorm)", choices=NORMS
        ),
        "eval_input": Option(
            "patches", "what evaluation sees: the mean features of the patches, or the whole image", choices=EVAL_INPUTS
        ),
    },
    prepare=_prepare,
    eval_patches=_eval_patches,
    width=None,
    paper=Paper("CPC", "van den Oord et al. 2018, arXiv:1807.03748, eq. 4; Hénaff et al. 2019, arXiv:1905.09272"),
)
