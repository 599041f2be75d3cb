"""Feature extraction and k-nearest-neighbour evaluation, on a CPU as on GPUs.

``engine_name=extract_features`` writes what VISSL's own engine writes, which needs a GPU (vissl/trainer/
trainer_main.py:345), in memory bounded by ``EXTRACT_FEATURES.CHUNK_THRESHOLD``. ``engine_name=knn`` extracts and then
classifies the test images by the training images; it replaces VISSL's tools/nearest_neighbor_test.py, which needs a GPU
too. It holds the training images' features of one layer, twice while they are put into order or normalised (8 N D bytes
for N images and D features: 21 GB for ImageNet and ResNet-50), and one chunk of the test images'.
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
from vissl.engines import extract_features as stock
from vissl.engines.engine_registry import Engine, register_engine
from vissl.models.model_helpers import get_trunk_output_feature_names
from vissl.trainer import SelfSupervisionTrainer

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.features import load_features
from plugins.tools.knn import knn_accuracy
from plugins.tools.records import write_json


class FeatureWriter:
    """Collects rows and writes them in chunks, under the names that VISSL's ExtractedFeaturesLoader reads.

    ``rank{R}_chunk{C}_{split}_{layer}_{features,targets,inds}.npy``, rows sorted by the index of the image.

    Args:
        folder: where to.
        split: "train" or "test".
        layers: names of the features.
        threshold: rows that are held before they are written; 0: none; -1: all.
    """

    def __init__(self, folder: Path, split: str, layers: list[str], threshold: int) -> None:
        self.folder, self.split, self.layers, self.threshold = folder, split, layers, threshold
        self._rows: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = []
        self._count = self._chunk = 0

    def add(self, indices: Tensor, targets: Tensor, features: list[Tensor]) -> None:
        """One batch: indices ``[B]``, targets ``[B, ...]``, and features ``[B, ...]`` of each layer."""
        if len(features) != len(self.layers):
            raise ValueError(f"{len(self.layers)} layers have names, but the model gives {len(features)}")
        # moved once, kept in the features' own precision
        self._rows.append((indices.cpu().numpy(), targets.cpu().numpy(), [layer.cpu().numpy() for layer in features]))
        self._count += len(indices)
        if 0 <= self.threshold <= self._count:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are held."""
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
    """VISSL's trainer with an extraction that any device can do."""

    @torch.no_grad()
    def extract(self, output_folder: str) -> None:
        """Write the features of each split; those of an earlier extraction into the folder are removed.

        Args:
            output_folder: where to.
        """
        task, config = self.task, self.cfg
        task.prepare_extraction(pin_memory=config.DATA.PIN_MEMORY)
        # a name for the output of the head, as VISSL has it, where no features of the trunk are asked for
        layers = get_trunk_output_feature_names(config.MODEL) or ["heads"]
        folder = Path(output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        if is_primary():
            for path in folder.iterdir():
                if re.fullmatch(r"rank\d+_chunk\d+_(train|test)_.*_(features|targets|inds)\.npy", path.name):
                    path.unlink()
        barrier()
        # nothing is trained: no DistributedDataParallel around the model
        model = task.base_model.eval()
        for split in task.available_splits:
            logging.info(f"Extracting features for partition: {split.lower()}")
            writer = FeatureWriter(folder, split.lower(), layers, config.EXTRACT_FEATURES.CHUNK_THRESHOLD)
            for sample in task.dataloaders[split.lower()]:
                images = torch.cat(sample["data"]).to(task.device, non_blocking=True)
                features = _flat(model(images))
                if layers == ["heads"]:  # SwAV's head gives the embedding and the scores of each set of prototypes
                    writer.layers = layers + [f"heads{number}" for number in range(1, len(features))]
                writer.add(torch.cat(sample["data_idx"]), torch.cat(sample["label"]), features)
            writer.flush()
        self._cleanup_task()


def _flat(output: Any) -> list[Tensor]:
    """The tensors of a model's output, which may be a list of lists."""
    return [tensor for part in output for tensor in (part if isinstance(part, list) else [part])]


def feature_chunks(folder: Path, split: str, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The features and classes of a split, each image once, file by file, in the order of the files.

    Args:
        folder: what ``extract_features`` wrote.
        split: "train" or "test".
        layer: name of the features.

    Raises:
        UserError: there are none.
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
    """What the names of the files of each chunk begin with."""
    stems = sorted(
        path.name.removesuffix("_inds.npy") for path in folder.glob(f"rank*_chunk*_{split}_{layer}_inds.npy")
    )
    if not stems:
        raise UserError(f"{folder} holds no features of {layer} of the {split} images")
    return stems


@register_engine("knn")
class NearestNeighborEngine(Engine):
    """Classifies each test image by its nearest training images, by cosine.

    ``NEAREST_NEIGHBOR.TOPK`` neighbours vote with weight ``exp(cosine / SIGMA)``. Prints one line a layer and writes
    knn.json. Features are normalised whatever ``L2_NORM_FEATS`` says: without, the weights overflow.
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
        """Called by VISSL in each process."""
        folder = Path(checkpoint_folder) / "knn_features"
        cfg.EXTRACT_FEATURES.OUTPUT_DIR = str(folder)
        # a file for each batch would be many: hold 4096 rows
        cfg.EXTRACT_FEATURES.CHUNK_THRESHOLD = max(cfg.EXTRACT_FEATURES.CHUNK_THRESHOLD, 4096)
        stock.extract_main(cfg, dist_run_id, checkpoint_folder, local_rank=local_rank, node_id=node_id)
        barrier()
        if not is_primary():
            return
        results = {}
        device = torch.device("cuda" if cfg.MACHINE.DEVICE == "gpu" else "cpu")
        for layer in get_trunk_output_feature_names(cfg.MODEL) or ["heads"]:
            bank = load_features(folder, "train", layer)
            k, sigma = cfg.NEAREST_NEIGHBOR.TOPK, cfg.NEAREST_NEIGHBOR.SIGMA
            rows, hits = 0, np.zeros(2)
            for features, classes in feature_chunks(folder, "test", layer):
                count = int((classes != -1).sum())  # the others are unlabelled
                if count:
                    accuracies = knn_accuracy(*bank, features, classes, k=k, temperature=sigma, device=device)
                    rows, hits = rows + count, hits + np.multiply(accuracies, count)
            top1, top5 = (hits / rows).tolist() if rows else (-1.0, -1.0)
            results[layer] = {"top1": top1, "top5": top5, "k": k, "sigma": sigma}
            print_on_rank_zero(f"kNN of {layer}: top-1 {top1:.2f} %, top-5 {top5:.2f} % ({k} neighbours)")
        write_json(Path(checkpoint_folder) / "knn.json", results)
        shutil.rmtree(folder)


def replace_trainer() -> None:
    """Let VISSL's ``extract_features`` engine use the Extractor."""
    stock.SelfSupervisionTrainer = Extractor
