"""AMDIM: features of one view predict the feature maps of the other (arXiv:1906.00910)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from plugins.clock import Clock
from plugins.distributed import LOCAL, Collective
from plugins.draws import step_generator
from plugins.heads import AMDIMHead
from plugins.losses import AMDIMLoss, AMDIMTerms, AMDIMView
from plugins.methods.common import LOG_EIGVALS
from plugins.spec import Embeddings, MethodSpec, Option, Paper


def draw_locations(
    places: Sequence[int],
    rows: int,
    *,
    seed: int,
    step: int,
    comm: Collective = LOCAL,
    device: torch.device | None = None,
) -> list[Int64[Tensor, " B"]]:
    """Draw one location of each image in each view, uniformly, for the images of this process.

    All processes draw for the joined batch, so that the locations do not depend on how it is divided.

    Args:
        places: number of locations of each view, ≥ 1.
        rows: number of images B on this process.
        seed: of the draw.
        step: number of optimiser steps before this one.
        comm: the processes that share the batch.
        device: of the result.

    >>> [drawn.shape for drawn in draw_locations([4, 4], 3, seed=0, step=0)]
    [torch.Size([3]), torch.Size([3])]
    """
    counts = comm.row_counts(rows, device)
    generator, before = step_generator(seed, step), sum(counts[: comm.rank])
    drawn = [torch.randint(count, (sum(counts),), generator=generator) for count in places]
    return [of_view[before : before + rows].to(device) for of_view in drawn]


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.amdim = AMDIMLoss(clip=options["clip"], reg=options["reg"], comm=comm)
        self.clock = Clock()
        self.seed, self.comm = options["locations_seed"], comm

    def forward(self, e: Embeddings) -> AMDIMTerms:
        step = self.clock.earlier()
        if not e.maps:
            raise ValueError("method amdim needs the projected feature maps of each view, e.maps, got none")
        views = [
            AMDIMView(whole, coarse.flatten(2), fine.flatten(2))
            for whole, (fine, coarse) in zip(e.z, e.maps, strict=True)
        ]
        places = [view.coarse.shape[2] for view in views]
        rows, device = len(e.z[0]), e.z[0].device
        locations = draw_locations(places, rows, seed=self.seed, step=step, comm=self.comm, device=device)
        return self.amdim.terms(views, locations, large=len(e.target))


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    return AMDIMHead(
        features_dim, options["proj_output_dim"], whole=options["project_features"], norm=options["proj_norm"]
    )


def _taps(options: Mapping[str, Any]) -> Mapping[str, int | None]:
    if options["fine_map"] == options["coarse_map"]:
        raise ValueError(
            f"method amdim: fine_map and coarse_map must be two modules, got {options['fine_map']!r} for both"
        )
    return {options[f"{name}_map"]: options[f"{name}_size"] or None for name in ("fine", "coarse")}


SPEC = MethodSpec(
    name="amdim",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        "proj_output_dim": Option(512, "width D of the embeddings, > 0", aliases={"n_rkhs": None}, low=1),
        "project_features": Option(
            True, "whether the features have a projection, as the maps; False for the published encoder"
        ),
        "proj_norm": Option(
            False, "whether batch norm follows the first layer of the projections, too", aliases={"use_bn": None}
        ),
        "fine_map": Option(
            "layer3", "module of the backbone with the finer map: stages.2 in timm, map7 in amdim_encoder"
        ),
        "coarse_map": Option(
            "layer4", "module of the backbone with the coarser map: stages.3 in timm, map5 in amdim_encoder"
        ),
        "fine_size": Option(
            4, "largest side of the finer map, which is pooled to it, >= 0; 0 leaves the map as it is", low=0
        ),
        "coarse_size": Option(
            2, "largest side of the coarser map, which is pooled to it, >= 0; 0 leaves the map as it is", low=0
        ),
        "clip": Option(20.0, "largest absolute score c, of c tanh(s / c), > 0", aliases={"tclip": None}, low=1e-6),
        "reg": Option(
            0.05, "weight of the mean squared score, >= 0; 0.05 in the published code, 0.04 in the paper", low=0.0
        ),
        "locations_seed": Option(0, "seed of the locations that predict a map of the other view, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("AMDIM", "Bachman, Hjelm and Buchwalter 2019, arXiv:1906.00910, eqs. 2-5"),
    taps=_taps,
)
