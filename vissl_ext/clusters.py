"""Engine ``cluster``: labels for ClusterFit from a k-means of extracted features.

It replaces VISSL's tools/cluster_features_and_label.py, which needs faiss. As there, the features are divided by their
length, reduced by VISSL's PCA if ``CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION`` is set, and clustered, all of them or
``CLUSTERFIT.DATA_LIMIT``. Differences: the k-means is that of :mod:`plugins.targets.kmeans`, whose first centroids
depend on ``SEED_VALUE``; an image that the sampler repeats is written once; centroids and distances are .npy files, and
not a pickle. Before its PCA, VISSL subtracts the mean twice from the features of the k-means (vissl/utils/pca.py:28),
but once from those that are compared with the centroids.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from vissl.data import build_dataset
from vissl.engines.engine_registry import Engine, register_engine
from vissl.utils.extract_features_utils import ExtractedFeaturesLoader
from vissl.utils.pca import PCA

from plugins.linalg import score_blocks
from plugins.targets import kmeans
from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.files import atomic
from plugins.tools.records import write_json
from plugins.tools.svm import unit_rows
from vissl_ext.features import extract_for, layer_names


def features_folder(config: Any) -> Path:
    """Return the folder of the features: ``CLUSTERFIT.FEATURES.PATH``, or ``features`` in the folder of the run."""
    given = str(config.CLUSTERFIT.FEATURES.PATH)
    return Path(config.CHECKPOINT.DIR, "features") if given in ("", ".") else Path(given).expanduser().absolute()


def check_clusters(config: Any) -> None:
    """Validate the section CLUSTERFIT.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: a setting is invalid, or there are no features and they will not be extracted.
    """
    section, key = config.CLUSTERFIT, "config.CLUSTERFIT"
    for name, least in (("NUM_CLUSTERS", 1), ("NUM_ITER", 0), ("FEATURES.DIMENSIONALITY_REDUCTION", 0)):
        value = section.FEATURES.DIMENSIONALITY_REDUCTION if "." in name else section[name]
        if type(value) is not int or value < least:
            raise UserError(f"{key}.{name} must be an integer, at least {least}, got {value!r}")
    for name in ("DATA_PARTITION", "TEST_PARTITION"):
        if (value := section.FEATURES[name]) not in ("TRAIN", "TEST", *([""] if name.startswith("TEST") else [])):
            raise UserError(f"{key}.FEATURES.{name} must be TRAIN or TEST, got {value!r}")
    if "TEST" in (section.FEATURES.DATA_PARTITION, section.FEATURES.TEST_PARTITION) and not config.TEST_MODEL:
        raise UserError(f"{key}.FEATURES names the TEST images: set config.TEST_MODEL=true, or TEST_PARTITION=''")
    if section.FEATURES.EXTRACT:
        if section.FEATURES.LAYER_NAME not in (*(names := layer_names(config)), ""):
            raise UserError(
                f"{key}.FEATURES.LAYER_NAME must be a layer whose features are extracted, {', '.join(names)}, got "
                f"{section.FEATURES.LAYER_NAME!r}"
            )
        return
    folder = features_folder(config)
    split, layer = section.FEATURES.DATA_PARTITION.lower(), section.FEATURES.LAYER_NAME or layer_names(config)[0]
    if not any(folder.glob(f"*_{split}_{layer}_features.npy")):
        raise UserError(
            f"{folder} contains no features of {layer} of the {split} images; extract them with "
            f"{key}.FEATURES.EXTRACT=true, or set {key}.FEATURES.PATH"
        )


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the nearest centroid of each row, and the squared distance.

    Args:
        rows: ``[N, D]``.
        centroids: ``[K, D]``.
    """
    labels, distances = [], []
    for part in score_blocks(len(rows), max(centroids.shape), rows.device, least=256):
        found = torch.cdist(rows[part], centroids).min(1)
        labels.append(found.indices)
        distances.append(found.values.square())
    return torch.cat(labels), torch.cat(distances)


@register_engine("cluster")
class ClusterEngine(Engine):
    """Cluster the training images, and write each image's cluster as its label.

    ``CLUSTERFIT.OUTPUT_DIR`` (default: the folder of the run) gets ``<prefix>_images.npy`` and ``<prefix>_labels.npy``
    for each split, which ``DATA_PATHS`` and ``LABEL_PATHS`` of a configuration for ClusterFit take, and
    ``<prefix>_centroids.npy`` and ``<prefix>_distances.npy``. The prefix is VISSL's,
    ``<data set>_<split>_<layer>_N<clusters>_D<width>``.
    """

    def run_engine(
        self,
        cfg: Any,
        dist_run_id: str,
        checkpoint_path: str,
        checkpoint_folder: str,
        local_rank: int = 0,
        node_id: int = 0,
        hook_generator: Any = None,
    ) -> None:
        """Run the engine; VISSL calls it in each process."""
        section = cfg.CLUSTERFIT
        folder = features_folder(cfg)
        if section.FEATURES.EXTRACT:
            cfg.EXTRACT_FEATURES.OUTPUT_DIR = str(folder)
            if extract_for("cluster", cfg, dist_run_id, checkpoint_folder, local_rank, node_id) is None:
                return
        elif local_rank or node_id:
            return
        layer = section.FEATURES.LAYER_NAME or layer_names(cfg)[0]
        split = section.FEATURES.DATA_PARTITION.lower()
        found = ExtractedFeaturesLoader.sample_features(
            str(folder),
            split,
            layer,
            num_samples=section.DATA_LIMIT,
            seed=section.DATA_LIMIT_SAMPLING.SEED,
            flatten_features=True,
        )["features"]
        if len(found) < section.NUM_CLUSTERS:
            raise UserError(
                f"config.CLUSTERFIT.NUM_CLUSTERS must be at most the number of features, {len(found)}, got "
                f"{section.NUM_CLUSTERS}"
            )
        rows, width = unit_rows(found, np.float32), section.FEATURES.DIMENSIONALITY_REDUCTION
        reduced = PCA(n_components=width) if width else None
        if reduced is not None:
            if width > min(rows.shape):
                key = "config.CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION"
                raise UserError(f"{key} must be at most {min(rows.shape)}, got {width}")
            reduced.fit(rows.copy())  # it subtracts the mean in place
            rows = reduced.transform(rows)
        device = torch.device("cuda" if cfg.MACHINE.DEVICE == "gpu" else "cpu")
        with tqdm(total=section.NUM_ITER + 1, desc="k-means", disable=None, leave=False) as bar:
            clusters = kmeans(
                torch.from_numpy(np.ascontiguousarray(rows)).to(device),
                section.NUM_CLUSTERS,
                iterations=section.NUM_ITER,
                seed=int(cfg.SEED_VALUE),
                report=lambda number, score: bar.update(),
            )
        results = {}
        for part in dict.fromkeys(filter(None, (section.FEATURES.DATA_PARTITION, section.FEATURES.TEST_PARTITION))):
            results[part.lower()] = self._label(cfg, folder, part, layer, clusters.centroids, reduced)
        write_json(Path(checkpoint_folder) / "metrics.json", {"cluster": results})

    def _label(self, cfg: Any, folder: Path, part: str, layer: str, centroids: Tensor, reduced: Any) -> dict[str, Any]:
        """Write the files of a split, and return what metrics.json has of it."""
        split, section = part.lower(), cfg.CLUSTERFIT
        (paths,) = build_dataset(cfg, part).get_image_paths()
        places, labels, distances = [], [], []
        for shard in ExtractedFeaturesLoader.get_shard_file_names(str(folder), split, layer):
            content = ExtractedFeaturesLoader.load_feature_shard(shard)
            rows = unit_rows(content.features, np.float32)
            rows = rows if reduced is None else np.ascontiguousarray(reduced.transform(rows))
            nearest_of, distance = nearest(torch.from_numpy(rows).to(centroids.device), centroids)
            places.append(content.indices)
            labels.append(nearest_of.cpu().numpy())
            distances.append(distance.cpu().numpy())
        if not places:
            raise UserError(f"{folder} contains no features of {layer} of the {split} images")
        order, first = np.unique(np.concatenate(places), return_index=True)
        labels, distances = np.concatenate(labels)[first], np.concatenate(distances)[first]
        count, width = centroids.shape
        name = section.FEATURES.DATASET_NAME or "images"
        prefix = f"{name}_{split}_{layer}_N{count}_D{width}"
        output = Path(section.OUTPUT_DIR).expanduser()
        output = Path(cfg.CHECKPOINT.DIR) if str(output) == "." else output
        arrays = {
            "images": np.array([str(Path(paths[place]).absolute()) for place in order]),
            "labels": labels.astype(np.int64),
            "distances": distances,
            "centroids": centroids.cpu().numpy(),
        }
        output.mkdir(parents=True, exist_ok=True)
        for kind, array in arrays.items():
            with atomic(output / f"{prefix}_{kind}.npy") as file:
                np.save(file, array)
        used, mean = len(np.unique(labels)), float(distances.mean())
        print_on_rank_zero(
            f"clusters of {layer}: {len(labels)} {split} images in {used} of {count} clusters, mean squared distance "
            f"{mean:.4f}; {output / prefix}_{{images,labels}}.npy"
        )
        return {"images": len(labels), "clusters": used, "mean_squared_distance": mean, "prefix": str(output / prefix)}
