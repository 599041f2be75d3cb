"""Feature extraction on CPUs and GPUs, for the engines of this package, and k-nearest-neighbour evaluation.

``engine_name=extract_features`` writes the files of VISSL's engine, which needs a GPU (vissl/trainer/
trainer_main.py:345); ``EXTRACT_FEATURES.CHUNK_THRESHOLD`` bounds its memory. ``engine_name=knn`` extracts features and
classifies the test images by their nearest training images. It replaces VISSL's tools/nearest_neighbor_test.py, which
needs a GPU. It stores in memory the features of the training images for one layer, twice while they are sorted or
normalised (8 N D bytes for N images and D features, 21 GB for ImageNet and ResNet-50), and one chunk of those of the
test images.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classy_vision.generic.distributed_util import barrier, get_rank, is_primary
from torch import Tensor
from tqdm import tqdm
from vissl.engines import extract_features as stock
from vissl.engines.engine_registry import Engine, register_engine
from vissl.models.model_helpers import get_trunk_output_feature_names
from vissl.trainer import SelfSupervisionTrainer

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.features import load_features
from plugins.tools.knn import knn_accuracy
from plugins.tools.records import write_json

_TEMPORARY = re.compile(r"\.\w+_features")
"""Names of folders with the features of an engine, which it deletes."""


class FeatureWriter:
    """Collect rows and write them in chunks, in the format of VISSL's ExtractedFeaturesLoader.

    The files are ``rank{R}_chunk{C}_{split}_{layer}_{features,targets,inds}.npy``, with rows sorted by image index.

    Args:
        folder: output folder.
        split: "train" or "test".
        layers: names of the layers.
        threshold: number of rows per chunk; 0 writes each batch, -1 writes a single chunk.
    """

    def __init__(self, folder: Path, split: str, layers: list[str], threshold: int) -> None:
        self.folder, self.split, self.layers, self.threshold = folder, split, layers, threshold
        self._rows: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = []
        self._count = self._chunk = 0

    def add(self, indices: Tensor, targets: Tensor, features: list[Tensor]) -> None:
        """Add a batch: image indices ``[B]``, targets ``[B, ...]``, and features ``[B, ...]`` of each layer."""
        if len(features) != len(self.layers):
            raise ValueError(f"the model must return features of {len(self.layers)} layers, got {len(features)}")
        # moved to the CPU once, in the precision of the model
        self._rows.append((indices.cpu().numpy(), targets.cpu().numpy(), [layer.cpu().numpy() for layer in features]))
        self._count += len(indices)
        if 0 <= self.threshold <= self._count:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows."""
        if not self._rows:
            return
        indices = np.concatenate([rows[0] for rows in self._rows])
        order = np.argsort(indices, kind="stable")
        targets = np.concatenate([rows[1] for rows in self._rows])[order].reshape(len(order), -1)
        for place, layer in enumerate(self.layers):
            features = np.concatenate([rows[2][place] for rows in self._rows])[order]
            stem = f"rank{get_rank()}_chunk{self._chunk}_{self.split}_{layer}"
            for kind, array in (("features", features), ("targets", targets), ("inds", indices[order])):
                np.save(self.folder / f"{stem}_{kind}.npy", array)
        self._rows, self._count = [], 0
        self._chunk += 1


class Extractor(SelfSupervisionTrainer):
    """VISSL's trainer with a feature extraction that runs on any device."""

    @torch.no_grad()
    def extract(self, output_folder: str) -> None:
        """Write the features of each split, and delete those of an earlier extraction.

        Args:
            output_folder: output folder.
        """
        task, config = self.task, self.cfg
        task.prepare_extraction(pin_memory=config.DATA.PIN_MEMORY)
        # without features of the trunk, the output of the head is written under VISSL's name
        layers = layer_names(config)
        folder = Path(output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        if is_primary():
            for path in folder.iterdir():
                if re.fullmatch(r"rank\d+_chunk\d+_(train|test)_.*_(features|targets|inds)\.npy", path.name):
                    path.unlink()
        barrier()
        # without training, the model needs no DistributedDataParallel
        model = task.base_model.eval()
        counts: dict[str, int] = {}
        for split in task.available_splits:
            logging.info(f"Extracting features for partition: {split.lower()}")
            writer = FeatureWriter(folder, split.lower(), layers, config.EXTRACT_FEATURES.CHUNK_THRESHOLD)
            loader = task.dataloaders[split.lower()]
            for sample in tqdm(loader, f"{split.lower()} features", disable=None if is_primary() else True):
                images = torch.cat(sample["data"]).to(task.device, non_blocking=True)
                features = _flat(model(images))
                if layers == ["heads"]:  # SwAV's head returns the embedding and the scores of each set of prototypes
                    writer.layers = layers + [f"heads{number}" for number in range(1, len(features))]
                writer.add(torch.cat(sample["data_idx"]), torch.cat(sample["label"]), features)
            writer.flush()
            counts[split.lower()] = len(task.dataloaders[split.lower()].dataset)
        barrier()
        self._cleanup_task()
        if not _TEMPORARY.fullmatch(folder.name):
            images = " and ".join(f"{counts[split]} {split}" for split in ("train", "test") if split in counts)
            print_on_rank_zero(f"wrote the features of {images} images ({', '.join(layers)}) to {folder}")


def extract_for(
    engine: str, cfg: Any, dist_run_id: str, checkpoint_folder: str, local_rank: int, node_id: int
) -> Path | None:
    """Extract the features for an engine, in each process.

    They are in ``EXTRACT_FEATURES.OUTPUT_DIR``, or, if it is not set, in a folder that the engine deletes with
    :func:`discard`.

    Args:
        engine: name of the engine.
        cfg: VISSL's configuration, below ``config``; changed in place.
        dist_run_id: the other arguments are those of ``Engine.run_engine``.

    Returns:
        The folder in the primary process, None in the others.
    """
    settings = cfg.EXTRACT_FEATURES
    settings.OUTPUT_DIR = settings.OUTPUT_DIR or str(Path(checkpoint_folder) / f".{engine}_features")
    # at least 4096 rows per file, instead of one file per batch
    settings.CHUNK_THRESHOLD = max(settings.CHUNK_THRESHOLD, 4096)
    stock.extract_main(cfg, dist_run_id, checkpoint_folder, local_rank=local_rank, node_id=node_id)
    barrier()
    return Path(settings.OUTPUT_DIR) if is_primary() else None


def discard(folder: Path) -> None:
    """Delete the folder of :func:`extract_for`, unless it is ``EXTRACT_FEATURES.OUTPUT_DIR``."""
    if _TEMPORARY.fullmatch(folder.name):
        shutil.rmtree(folder)


def layer_names(cfg: Any) -> list[str]:
    """Return the names of the layers whose features are extracted.

    Args:
        cfg: VISSL's configuration, below ``config``.
    """
    return get_trunk_output_feature_names(cfg.MODEL) or ["heads"]


def _flat(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, which may be a list of lists."""
    return [tensor for part in output for tensor in (part if isinstance(part, list) else [part])]


def feature_chunks(folder: Path, split: str, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features and classes of a split file by file, each image once.

    Args:
        folder: output folder of ``extract_features``.
        split: "train" or "test".
        layer: name of the layer.

    Raises:
        UserError: the folder has no such features.
    """
    seen = np.empty(0, dtype=np.int64)
    for stem in _stems(folder, split, layer):
        features, targets, indices = (
            np.load(folder / f"{stem}_{kind}.npy", allow_pickle=False) for kind in ("features", "targets", "inds")
        )
        indices, first = np.unique(indices, return_index=True)
        rows = first[~np.isin(indices, seen)]
        seen = np.union1d(seen, indices)
        yield torch.from_numpy(features.reshape(len(features), -1)[rows]), torch.from_numpy(targets[rows, 0]).long()


def _stems(folder: Path, split: str, layer: str) -> list[str]:
    """Return the common prefix of the file names of each chunk."""
    stems = sorted(
        path.name.removesuffix("_inds.npy") for path in folder.glob(f"rank*_chunk*_{split}_{layer}_inds.npy")
    )
    if not stems:
        raise UserError(f"{folder} contains no features of {layer} of the {split} images")
    return stems


class LayerEngine(Engine):
    """Extract the features, evaluate each layer, print its lines and write the results."""

    name: str
    title: str
    """The beginning of a line, before "of LAYER"."""

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
        folder = extract_for(self.name, cfg, dist_run_id, checkpoint_folder, local_rank, node_id)
        if folder is None:
            return
        results = {}
        for layer in layer_names(cfg):
            results[layer], lines = self.evaluate(cfg, folder, layer)
            for line in lines:
                print_on_rank_zero(f"{self.title} of {layer}: {line}")
        self.write(Path(checkpoint_folder), results)
        discard(folder)

    def evaluate(self, cfg: Any, folder: Path, layer: str) -> tuple[dict[str, Any], list[str]]:
        """Return the results of a layer, whose features are in a folder, and the lines that describe them."""
        raise NotImplementedError

    def write(self, folder: Path, results: dict[str, Any]) -> None:
        """Write the results of all layers to metrics.json."""
        write_json(folder / "metrics.json", {self.name: results})


@register_engine("knn")
class NearestNeighborEngine(LayerEngine):
    """Classify each test image by its nearest training images, measured by the cosine.

    ``NEAREST_NEIGHBOR.TOPK`` neighbours, at most all training images, vote with weight ``exp(cosine / SIGMA)``. The
    engine prints one line per layer
    and writes knn.json. It ignores ``L2_NORM_FEATS`` and normalises all features, because the weights would overflow.
    """

    name, title = "knn", "kNN"

    def evaluate(self, cfg: Any, folder: Path, layer: str) -> tuple[dict[str, Any], list[str]]:
        """Return the accuracies."""
        device = torch.device("cuda" if cfg.MACHINE.DEVICE == "gpu" else "cpu")
        bank = load_features(folder, "train", layer)
        labelled = int((bank[1] != -1).sum())
        k, sigma = min(cfg.NEAREST_NEIGHBOR.TOPK, max(labelled, 1)), cfg.NEAREST_NEIGHBOR.SIGMA
        rows, hits = 0, np.zeros(2)
        for features, classes in feature_chunks(folder, "test", layer):
            count = int((classes != -1).sum())  # -1 means unlabelled
            if count:
                accuracies = knn_accuracy(*bank, features, classes, k=k, temperature=sigma, device=device)
                rows, hits = rows + count, hits + np.multiply(accuracies, count)
        top1, top5 = (hits / rows).tolist() if rows else (-1.0, -1.0)
        line = f"top-1 {top1:.2f} %, top-5 {top5:.2f} % ({k} neighbours)"
        return {"top1": top1, "top5": top5, "k": k, "sigma": sigma}, [line]

    def write(self, folder: Path, results: dict[str, Any]) -> None:
        """Write the results of all layers to knn.json."""
        write_json(folder / "knn.json", results)


def replace_trainer() -> None:
    """Use the Extractor in VISSL's ``extract_features`` engine."""
    stock.SelfSupervisionTrainer = Extractor
