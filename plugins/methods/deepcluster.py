"""DeepCluster: predict clusters that k-means makes of the features in each epoch (arXiv:1807.05520)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugins.clock import Feed
from plugins.distributed import Collective
from plugins.draws import draw_seed
from plugins.heads import ssv_deepcluster_head
from plugins.linalg import directions
from plugins.losses import DeepClusterTerms, cluster_weights, deepcluster_terms
from plugins.methods.common import HALF_FEATURES, HEAD, ProjectingLoss
from plugins.sobel import sobel_
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper
from plugins.targets import kmeans, whitened
from plugins.targets.label_table import (
    LabelTable,
    Progress,
    check_clusters,
    collect_features,
    warn_without_pass,
)

BALANCES = ("weight", "none")


class _Loss(ProjectingLoss):
    weights: Tensor

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__(options, comm)
        self.table = LabelTable(1, options["num_clusters"], seed=draw_seed(options["clusters_seed"]))
        # of an image by its cluster; a buffer, because a run that is resumed within an epoch does not cluster again
        self.register_buffer("weights", torch.ones(options["num_clusters"]))

    def allocate(self, size: int) -> None:
        """Check the number of images; the objective also allocates the labels."""
        check_clusters("num_clusters", self.table.classes, size)

    def forward(self, e: Embeddings) -> DeepClusterTerms:
        (labels,) = self.table.read(e.index)
        return deepcluster_terms(e.p[0], labels, weights=self.weights, comm=self.comm)

    @torch.no_grad()
    def start_epoch(self, epoch: int, feed: Feed | None) -> Iterable[nn.Parameter]:
        """Cluster the features of the training set, and initialise the top layer anew."""
        if int(self.table.epoch) == epoch:  # a run that is resumed within an epoch keeps its clusters
            return ()
        if feed is None:
            if int(self.table.epoch) < 0:
                warn_without_pass("DeepCluster", "random labels")
            return ()
        options, progress = self.options, Progress("deepcluster", self.comm)
        seed = draw_seed(options["clusters_seed"], epoch)
        index, features = collect_features(feed, self.table.size, progress, self.comm, half=options["half_features"])
        width = options["pca_dim"]
        rows = whitened(features, width, comm=self.comm) if width else directions(features.float())
        del features
        iterations = options["kmeans_iterations"]
        found = kmeans(
            rows,
            options["num_clusters"],
            iterations=iterations,
            index=index,
            seed=seed,
            report=progress.of("k-means, iteration", iterations),
            comm=self.comm,
        )
        self.table.write(0, index, found.labels, self.comm)
        if options["balance"] == "weight":
            self.weights.copy_(cluster_weights(self.table.labels[0].long(), len(self.weights)))
        self.table.epoch.fill_(epoch)
        return self._new_top_layer(seed)

    def _new_top_layer(self, seed: int) -> list[nn.Parameter]:
        """Initialise the last Linear layer of the head anew: weights of standard deviation 0.01, biases 0."""
        *_, layer = (module for module in self.projector.modules() if isinstance(module, nn.Linear))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(layer.weight.shape, generator=generator) * 0.01
        layer.weight.copy_(drawn)
        if layer.bias is not None:
            layer.bias.zero_()
        return [*layer.parameters()]


def _prepare(options: Mapping[str, Any], backbone: nn.Module) -> nn.Module:
    return sobel_(backbone) if options["sobel"] else backbone


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    if options["head"] == "ssv":
        return ssv_deepcluster_head(features_dim, options["num_clusters"])
    return nn.Linear(features_dim, options["num_clusters"])


SPEC = MethodSpec(
    name="deepcluster",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=1,
    indexed=True,
    options={
        "num_clusters": Option(10000, "clusters K, >= 2, at most a few for every hundred images", low=2),
        "head": HEAD,
        "pca_dim": Option(
            256, "components of the features that are clustered, whitened, >= 0; 0 clusters their directions", low=0
        ),
        "kmeans_iterations": Option(20, "iterations of k-means, >= 0", low=0),
        "balance": Option(
            "weight", "weight: all clusters count alike, like the published sampler; none: all images", choices=BALANCES
        ),
        "sobel": Option(
            False, "whether the backbone sees the output of a fixed Sobel filter in place of colours, as published"
        ),
        "half_features": HALF_FEATURES,
        "clusters_seed": Option(0, "seed of the clusters and of the top layer, >= 0", low=0),
    },
    paper=Paper("DeepCluster", "Caron et al. 2018, arXiv:1807.05520"),
    width="num_clusters",
    hints=lambda options: {"projector": Hints(momentum=0.0)},
    prepare=_prepare,
)
