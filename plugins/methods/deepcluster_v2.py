"""DeepCluster v2: spherical clusters of the last epoch's embeddings are prototypes (arXiv:2006.09882, appendix D)."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugins.clock import Clock, Feed
from plugins.distributed import Collective
from plugins.draws import draw_seed
from plugins.heads import UnitRows, plain_head
from plugins.losses import DeepClusterV2Terms, deepcluster_v2_terms
from plugins.methods.common import LOG_EIGVALS, ProjectingLoss, projector_options
from plugins.modes import in_mode
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from plugins.targets import IndexedBank, kmeans
from plugins.targets.label_table import (
    IGNORED,
    LabelTable,
    Progress,
    check_clusters,
    warn_without_pass,
)

NEVER = -2
"""Stamp of a row of the banks that has not been written; -1 is the pass before epoch 0."""


class _Loss(ProjectingLoss):
    prototypes: Tensor
    stamps: Tensor

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__(options, comm)
        clusterings, width = options["num_clusterings"], options["proj_output_dim"]
        self.clock = Clock()
        self.table = LabelTable(clusterings, 0)
        self.banks: Any = nn.ModuleList(IndexedBank(None, width, momentum=0.0, seed=view) for view in range(2))
        # the epoch in which each image was last seen
        self.register_buffer("stamps", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("prototypes", torch.zeros(clusterings, options["num_prototypes"], width))

    def allocate(self, size: int) -> None:
        """Check the number of images, none of which has been seen; the objective also allocates banks and labels."""
        check_clusters("num_prototypes", self.prototypes.shape[1], size)
        if not len(self.stamps):
            self.stamps = self.stamps.new_full((size,), NEVER)

    def forward(self, e: Embeddings) -> DeepClusterV2Terms:
        self.clock()
        labels = self.table.read(e.index)
        terms = deepcluster_v2_terms(
            e.z, labels, [*self.prototypes], temperature=self.options["temperature"], comm=self.comm
        )
        if self.training:
            self._write(e.index, e.z, self.clock.epoch or 0)
        return terms

    @torch.no_grad()
    def _write(self, index: Any, views: list[Tensor], epoch: int) -> None:
        """Store the embeddings of the large views of this process's images."""
        for bank, view in zip(self.banks, views, strict=False):
            bank.write(index, view.detach(), self.comm)
        self.stamps[self.comm.gather_rows(index)] = epoch

    @torch.no_grad()
    def start_epoch(self, epoch: int, feed: Feed | None) -> Iterable[nn.Parameter]:
        """Cluster the embeddings of the previous epoch; before the first one, of a pass over the training set."""
        if int(self.table.epoch) == epoch or bool((self.stamps == epoch).any()):
            return ()  # a run that is resumed within an epoch keeps its clusters
        count = self.prototypes.shape[1]
        progress = Progress("deepcluster_v2", self.comm)
        if not bool((self.stamps > NEVER).any()):
            if feed is None:
                warn_without_pass("DeepCluster v2", "no labels in this epoch, with the loss 0")
                return ()
            self._first_pass(feed, epoch - 1, progress)
        seen = (self.stamps == epoch - 1).nonzero().flatten()
        self.table.labels.fill_(IGNORED)
        self.table.epoch.fill_(epoch)
        if len(seen) < count:
            warnings.warn(
                f"DeepCluster v2 has seen {len(seen)} images in the previous epoch, too few for {count} prototypes: "
                "this epoch has no labels, and the loss 0",
                stacklevel=3,
            )
            return ()
        iterations, clusterings = self.options["kmeans_iterations"], len(self.prototypes)
        places = torch.arange(self.comm.rank, len(seen), self.comm.size, device=seen.device)
        for number in range(clusterings):
            found = kmeans(
                self.banks[number % 2].rows[seen[places]],
                count,
                iterations=iterations,
                spherical=True,
                index=places,
                seed=draw_seed(self.options["clusters_seed"], epoch, number),
                report=progress.of(f"clustering {number + 1} of {clusterings}, iteration", iterations),
                comm=self.comm,
            )
            self.prototypes[number] = found.centroids
            self.table.write(number, seen[places], found.labels, self.comm)
        return ()

    def _first_pass(self, feed: Feed, epoch: int, progress: Progress) -> None:
        """Fill the banks with the embeddings of the augmented images, in training mode as published."""
        projector, done = self.projector, 0
        dtype = next(projector.parameters()).dtype
        with in_mode(True, projector):
            for index, features in feed(view="train", mode="train"):
                self._write(index, [projector(view.to(dtype)) for view in features[:2]], epoch)
                done += len(index) * self.comm.size
                progress("embeddings of images", min(done, len(self.stamps)), len(self.stamps))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}stamps")
        if not len(self.stamps) and isinstance(saved, Tensor):
            self.stamps = self.stamps.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    widths = features_dim, options["proj_hidden_dim"], options["proj_output_dim"]
    return nn.Sequential(*plain_head(*widths, layers=2, norm=True), UnitRows())


SPEC = MethodSpec(
    name="deepcluster_v2",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    large=2,
    indexed=True,
    options={
        **projector_options(hidden=2048, output=128),
        "num_prototypes": Option(3000, "clusters K of each clustering, >= 2, at most the number of images", low=2),
        "num_clusterings": Option(
            3, "clusterings H with first centroids of their own, >= 1", aliases={"num_heads": None}, low=1
        ),
        "temperature": Option(0.1, "of the softmax, > 0", low=1e-6),
        "kmeans_iterations": Option(10, "iterations of spherical k-means, >= 0", aliases={"kmeans_iters": None}, low=0),
        "clusters_seed": Option(0, "seed of the clusterings, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("DeepCluster v2", "Caron et al. 2020, arXiv:2006.09882, appendix D"),
)
