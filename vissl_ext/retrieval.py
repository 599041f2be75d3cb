"""Engine ``retrieval``: rank the images of a data set by the similarity of their features to those of query images.

It replaces VISSL's tools/instance_retrieval_test.py, which needs a GPU. Image sizes, pooling (R-MAC, GeM, mean over
scales), PCA whitening, data sets and scores are VISSL's own code (vissl/utils/instance_retrieval_utils). Differences:

- A further protocol, ``EVAL_DATASET_NAME=folder``: each image of ``DATASET_PATH`` is a query for the other images of
  its class folder.
- ``TRAIN_DATASET_NAME`` may also be any folder of images, in ``DATASET_PATH`` or elsewhere. With ``WHITEN_IMG_LIST``
  the PCA sees the images that this file lists; vissl/utils/instance_retrieval_utils/data_util.py:509 fails on them.
- ``EVAL_DATASET_NAME`` Oxford and Paris need no program ``compute_ap``.
- INSTRE, whose images vissl/utils/instance_retrieval_utils/data_util.py:520 cannot read, is not supported.
- Features of an earlier command are not used again. With ``SAVE_FEATURES`` those of all images are in two files.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm
from vissl.engines.engine_registry import Engine, register_engine
from vissl.models import build_model
from vissl.utils.env import set_env_vars
from vissl.utils.instance_retrieval_utils import data_util
from vissl.utils.instance_retrieval_utils.evaluate import compute_map
from vissl.utils.instance_retrieval_utils.rmac import get_rmac_descriptors
from vissl.utils.logger import setup_logging, shutdown_logging
from vissl.utils.pca import PCA

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.files import atomic
from plugins.tools.folders import class_names, walk
from plugins.tools.images import open_image
from plugins.tools.records import write_json
from vissl_ext.summary import plain

REVISITED = ("roxford5k", "rparis6k")
LANDMARKS = ("Oxford", "Paris")
EVALUATED = (*REVISITED, *LANDMARKS, "copydays", "folder")
"""Values of EVAL_DATASET_NAME."""
POOLINGS = ("rmac", "gem", "")
_PATH = "config.IMG_RETRIEVAL.DATASET_PATH"
KS = [1, 5, 10]
"""Numbers of images of the precision at k, as in VISSL."""


def images_in(folder: Path) -> list[str]:
    """Return the sorted paths of the images in a folder and its subfolders."""
    return sorted(os.path.join(place, name) for place, names in walk(folder) for name in names if is_image_file(name))


class FolderDataset:
    """Each image is a query for the other images of its class folder, with the interface of VISSL's data sets.

    Args:
        folder: folder with one subfolder per class, of which at least one has two images.
    """

    def __init__(self, folder: Path) -> None:
        names = class_names(folder)
        images = [(path, number) for number, name in enumerate(names) for path in images_in(folder / name)]
        self.paths = [path for path, _ in images]
        self.classes = np.array([number for _, number in images])

    @cached_property
    def truth(self) -> list[dict[str, np.ndarray]]:
        """VISSL's ground truth of each query: relevant images, and the query itself, which does not count."""
        every = np.arange(len(self.paths))
        same = [np.flatnonzero(self.classes == number) for number in self.classes]
        return [{"ok": same[i][same[i] != i], "junk": every[i : i + 1]} for i in every]

    def get_num_images(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def get_filename(self, i: int) -> str:
        """Return the path of an image."""
        return self.paths[i]

    get_num_query_images, get_query_filename = get_num_images, get_filename

    def get_query_roi(self, i: int) -> None:
        """Return None: the whole image is the query."""

    def score(self, similarity: np.ndarray, temp_dir: str | None = None) -> dict[str, Any]:
        """Return mAP and mean precision at k of similarities ``[queries, images]``."""
        mean, _, at_k, _ = compute_map(np.argsort(-similarity.T, axis=0), self.truth, KS)
        return {"mAP": mean, "mp@k": {"k": KS, "mAP": at_k.tolist()}}


_CORRUPT = {
    f"paris_{place}_{number:06}"
    for place, numbers in {
        "louvre": (136, 146),
        "moulinrouge": (422,),
        "museedorsay": (1059,),
        "notredame": (188,),
        "pantheon": (284, 960, 974),
        "pompidou": (195, 196, 201, 467, 640),
        "sacrecoeur": (299, 330, 353),
        "triomphe": (662, 833, 863, 867),
    }.items()
    for number in numbers
}
"""Images of Paris6k that its authors list as corrupt, and that no evaluation uses."""


class LandmarkDataset(FolderDataset):
    """Oxford5k (Philbin et al. 2007) or Paris6k (Philbin et al. 2008), in the files of the authors.

    A query is a region of an image. Its relevant images are those of the lists good and ok; those of the list junk do
    not count. The average precision is that of the authors' program ``compute_ap``.

    Args:
        folder: with the images in ``jpg`` or its subfolders, and the files NAME_query.txt, NAME_good.txt, NAME_ok.txt
            and NAME_junk.txt of each query in ``lab``.

    Raises:
        UserError: there are no images or queries, a file is missing, or a query has no image.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = [path for path in images_in(folder / "jpg") if Path(path).stem not in _CORRUPT]
        numbers = {Path(path).stem: number for number, path in enumerate(self.paths)}
        self.queries: list[tuple[int, list[float]]] = []
        truth = []
        for file in sorted((folder / "lab").glob("*_query.txt")):
            image, *box = file.read_text().split()
            image, lists = image.removeprefix("oxc1_"), {}
            for kind in ("good", "ok", "junk"):
                path = file.with_name(file.name.replace("_query.txt", f"_{kind}.txt"))
                if not path.is_file():
                    raise UserError(f"{_PATH}: there is no file {path}")
                lists[kind] = [numbers[name] for name in path.read_text().split() if name in numbers]
            if image not in numbers or len(box) != 4:
                raise UserError(f"{_PATH}: {file} must name an image of {folder / 'jpg'} and four coordinates")
            self.queries.append((numbers[image], [float(value) for value in box]))
            truth.append({"ok": np.array(sorted({*lists["good"], *lists["ok"]})), "junk": np.array(lists["junk"])})
        if not truth:
            raise UserError(f"{_PATH}: there are no files NAME_query.txt in {folder / 'lab'}")
        self.truth = truth

    def get_num_query_images(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    def get_query_filename(self, i: int) -> str:
        """Return the path of the image of a query."""
        return self.paths[self.queries[i][0]]

    def get_query_roi(self, i: int) -> list[float]:
        """Return the region of a query: left, top, right and bottom, in pixels."""
        return self.queries[i][1]


def check_retrieval(config: Any) -> None:
    """Validate the section IMG_RETRIEVAL and the features.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: a setting is invalid, or the data set does not exist.
    """
    section, key, features = config.IMG_RETRIEVAL, "config.IMG_RETRIEVAL", config.MODEL.FEATURE_EVAL_SETTINGS
    for name, allowed in (
        ("EVAL_DATASET_NAME", EVALUATED),
        ("FEATS_PROCESSING_TYPE", POOLINGS),
        ("SIMILARITY_MEASURE", ("cosine_similarity", "l2")),
    ):
        if section[name] not in allowed:
            listed = ", ".join(repr(value) for value in allowed)
            raise UserError(f"{key}.{name} must be one of {listed}, got {section[name]!r}")
    scales = list(section.IMG_SCALINGS) or [1]
    if section.SPATIAL_LEVELS < 1 or any(scale <= 0 for scale in scales):
        raise UserError(f"{key}: SPATIAL_LEVELS must be at least 1, and IMG_SCALINGS above 0, got {scales}")
    if section.FEATS_PROCESSING_TYPE == "rmac" and (len(scales) > 1 or not section.TRAIN_PCA_WHITENING):
        raise UserError(f"{key}.FEATS_PROCESSING_TYPE=rmac needs TRAIN_PCA_WHITENING=true and one scale, got {scales}")
    if not features.EVAL_MODE_ON or len(features.LINEAR_EVAL_FEAT_POOL_OPS_MAP) != 1:
        raise UserError(
            "engine_name=retrieval compares the features of one layer: set "
            "config.MODEL.FEATURE_EVAL_SETTINGS.EVAL_MODE_ON=true and "
            "LINEAR_EVAL_FEAT_POOL_OPS_MAP=[[res5,[Identity,[]]]]"
        )
    if section.FEATS_PROCESSING_TYPE and features.SHOULD_FLATTEN_FEATS:
        raise UserError(
            f"{key}.FEATS_PROCESSING_TYPE={section.FEATS_PROCESSING_TYPE} pools feature maps: set "
            "config.MODEL.FEATURE_EVAL_SETTINGS.SHOULD_FLATTEN_FEATS=false"
        )
    if config.DISTRIBUTED.NUM_PROC_PER_NODE * config.DISTRIBUTED.NUM_NODES > 1:
        raise UserError("engine_name=retrieval runs in one process: set config.DISTRIBUTED.NUM_PROC_PER_NODE=1")
    section.DATASET_PATH = str(Path(str(section.DATASET_PATH)).expanduser().absolute())
    if section.WHITEN_IMG_LIST:
        section.WHITEN_IMG_LIST = str(Path(str(section.WHITEN_IMG_LIST)).expanduser().absolute())
    _evaluated(section)
    if section.TRAIN_PCA_WHITENING:
        _training_images(section)


def _evaluated(section: Any) -> Any:
    """Return the data set of the evaluation."""
    root, name = Path(section.DATASET_PATH), section.EVAL_DATASET_NAME
    if name == "folder":
        if not root.is_dir():
            raise UserError(f"{_PATH}: there is no folder {root}")
        dataset = FolderDataset(root)
        if not any(len(truth["ok"]) for truth in dataset.truth):
            raise UserError(f"{_PATH}: {root} must have one subfolder per class, and two images in one of them")
        return dataset
    needed = ["queries", "database_and_distractors" if section.USE_DISTRACTORS else "database"]
    if name != "copydays":
        needed = ["jpg", f"gnd_{name}.pkl" if name in REVISITED else "lab"]
    for entry in needed:
        if not (root / name / entry).exists():
            raise UserError(f"{_PATH}: {name} needs {root / name / entry}, which does not exist")
    if name in REVISITED:
        return data_util.RevisitedInstanceRetrievalDataset(name, str(root))
    if name in LANDMARKS:
        return LandmarkDataset(root / name)
    return data_util.CopyDaysDataset(str(root / name), use_distractors=section.USE_DISTRACTORS)


def _training_images(section: Any) -> list[str]:
    """Return the images of the PCA."""
    root, name = Path(section.DATASET_PATH), str(section.TRAIN_DATASET_NAME)
    key = "config.IMG_RETRIEVAL.TRAIN_DATASET_NAME"
    folder = root / name  # ``name`` alone if it is absolute
    if section.WHITEN_IMG_LIST:
        return _listed_images(folder, Path(section.WHITEN_IMG_LIST))
    if name in LANDMARKS and (folder / "lab").is_dir():
        return LandmarkDataset(folder).paths
    if name in REVISITED and (folder / f"gnd_{name}.pkl").is_file():
        dataset = data_util.RevisitedInstanceRetrievalDataset(name, str(root))
        return [dataset.get_filename(i) for i in range(dataset.get_num_images())]
    images = images_in(folder) if name and folder.is_dir() else []
    if not images:
        raise UserError(
            f"{key}: there are no images in {folder}, with which the PCA is computed; set a folder of other images, or "
            "config.IMG_RETRIEVAL.TRAIN_PCA_WHITENING=false"
        )
    return images


def _listed_images(folder: Path, file: Path) -> list[str]:
    """Return the paths of the images in a folder whose names are the lines of a file."""
    key = "config.IMG_RETRIEVAL.WHITEN_IMG_LIST"
    if not file.is_file():
        raise UserError(f"{key}: there is no file {file}")
    images = [folder / name for name in file.read_text().splitlines() if name]
    missing = [path for path in images if not path.is_file()]
    if missing or not images:
        what = f"lists {missing[0].relative_to(folder)}, which is not in {folder}" if missing else "lists no image"
        raise UserError(f"{key}: {file} {what}; its lines are paths below DATASET_PATH/TRAIN_DATASET_NAME")
    return [str(path) for path in images]


class Describer:
    """Computes the descriptor of an image.

    Args:
        cfg: VISSL's configuration, below ``config``.
        model: VISSL's model, in evaluation mode, whose output is the features of one layer.
        device: of the model.
    """

    def __init__(self, cfg: Any, model: Any, device: torch.device) -> None:
        self.section, self.model, self.device = cfg.IMG_RETRIEVAL, model, device
        normalise = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        self.loader = data_util.InstanceRetrievalImageLoader(
            S=self.section.RESIZE_IMG, transforms=transforms.Compose([transforms.ToTensor(), normalise])
        )

    def maps(self, path: str, roi: Any) -> list[Tensor]:
        """Return the features of each scale; of an image with a region of interest, those of the region."""
        image, ratio = self.loader.apply_img_transform(open_image(path).convert("RGB"))
        if roi is not None:
            left, top, right, bottom = np.round(np.array(roi) * ratio).astype(int)
            image = image[:, top:bottom, left:right]
        found = []
        for scale in list(self.section.IMG_SCALINGS) or [1]:
            scaled = torch.nn.functional.interpolate(image[None], scale_factor=scale, mode="bilinear")
            found.append(self.model(scaled.to(self.device))[0].float().cpu())
        return found

    @torch.no_grad()
    def __call__(self, path: str, roi: Any = None, pca: PCA | None = None, *, regions: bool = False) -> np.ndarray:
        """Return the descriptor ``[1, D]``, or, for the PCA, with ``regions``, of R-MAC's regions ``[R, D]``."""
        section, maps = self.section, self.maps(path, roi)
        pooling, normalise = section.FEATS_PROCESSING_TYPE, section.NORMALIZE_FEATURES
        if pooling and maps[0].ndim != 4:
            raise UserError(
                f"config.IMG_RETRIEVAL.FEATS_PROCESSING_TYPE={pooling} pools feature maps [1, C, H, W], but the layer "
                f"has {list(maps[0].shape)}"
            )
        if pooling == "rmac":
            found = get_rmac_descriptors(maps[0], section.SPATIAL_LEVELS, pca=pca, normalize=normalise)
            return found.reshape(-1, found.shape[-1]).numpy()
        if pooling == "gem":
            found = data_util.get_average_gem(maps, p=section.GEM_POOL_POWER, add_bias=True)
        else:
            if len({part.shape for part in maps}) > 1:
                raise UserError(
                    "config.IMG_RETRIEVAL.IMG_SCALINGS of several scales needs pooled features: set "
                    "FEATS_PROCESSING_TYPE=gem, or pool the layer in LINEAR_EVAL_FEAT_POOL_OPS_MAP"
                )
            found = torch.stack(maps).mean(0).flatten(1)
        found = data_util.l2n(found, dim=1) if normalise else found
        return (found if pca is None else pca.apply(found)).numpy()


@register_engine("retrieval")
class RetrievalEngine(Engine):
    """Print a line with the scores, and write metrics.json, rankings.json and similarity_scores.json."""

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
        """Run the engine; VISSL calls it in the process of the run."""
        set_env_vars(local_rank, node_id, cfg)
        setup_logging(__name__, output_dir=checkpoint_folder)
        section, folder = cfg.IMG_RETRIEVAL, Path(checkpoint_folder)
        limits = dict(zip(("TRAINING", "QUERY", "DATABASE"), (10, 10, 50), strict=True))
        for name, limit in limits.items():
            given = section[f"NUM_{name}_SAMPLES"]
            limits[name] = given if given > 0 else limit if section.DEBUG_MODE else None
        dataset = _evaluated(section)
        describe = Describer(cfg, *_model(cfg))
        pca = None
        if section.TRAIN_PCA_WHITENING:
            images = _training_images(section)[: limits["TRAINING"]]
            pca = _pca(section.N_PCA, [describe(path, regions=True) for path in _bar(images, "images of the PCA")])
        queries = range(dataset.get_num_query_images())[: limits["QUERY"]]
        places = range(dataset.get_num_images())[: limits["DATABASE"]]
        crop = section.CROP_QUERY_ROI
        of_queries = [
            describe(dataset.get_query_filename(i), dataset.get_query_roi(i) if crop else None, pca)
            for i in _bar(queries, "queries")
        ]
        of_images = [describe(dataset.get_filename(i), None, pca) for i in _bar(places, "images")]
        if len({part.shape for part in (*of_queries, *of_images)}) > 1:
            raise UserError(
                "the images have features of different sizes: set config.IMG_RETRIEVAL.FEATS_PROCESSING_TYPE=gem or "
                "rmac, or pool the layer in LINEAR_EVAL_FEAT_POOL_OPS_MAP"
            )
        found, database = np.concatenate(of_queries), np.concatenate(of_images)
        if section.SIMILARITY_MEASURE == "l2":
            similarity = -torch.cdist(torch.from_numpy(found), torch.from_numpy(database)).numpy()
        else:
            similarity = found @ database.T
        results = plain(_numbers(dataset.score(similarity)))
        write_json(folder / "metrics.json", results)
        if section.SAVE_RETRIEVAL_RANKINGS_SCORES:
            rankings = np.argsort(-similarity, axis=1)
            for name, array in (("rankings", rankings), ("similarity_scores", similarity.T)):
                with atomic(folder / f"{name}.json", "w") as file:
                    json.dump(array.tolist(), file)
        if section.SAVE_FEATURES:
            for name, array in (("queries", found), ("images", database)):
                np.save(folder / f"features_{name}.npy", array)
        for line in describe_scores(results):
            print_on_rank_zero(f"retrieval in {section.EVAL_DATASET_NAME}: {line}")
        shutdown_logging()


def describe_scores(results: dict[str, Any]) -> list[str]:
    """Return a line for each set of queries in the results of a data set's ``score``."""
    if "mAP" not in results:  # the sets of queries of Copydays
        return [f"{name}: {line}" for name, part in results.items() for line in describe_scores(part)]
    names, mean, at_k = {"e": "easy ", "m": "medium ", "h": "hard "}, results["mAP"], results["mp@k"]
    parts = mean if isinstance(mean, dict) else {"mAP": mean}
    shown = ", ".join(f"{names.get(name, '')}mAP {100 * value:.2f} %" for name, value in parts.items())
    precisions = [
        f"{names.get(name, '')}precision at {', '.join(map(str, at_k['k']))}: "
        f"{', '.join(f'{100 * value:.2f}' for value in at_k[name])} %"
        for name in parts
    ]
    return ["; ".join([shown, *precisions])]


def _bar(items: Any, title: str) -> Any:
    return tqdm(items, title, disable=None, leave=False)


def _numbers(value: Any) -> Any:
    """Convert NumPy's numbers."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _model(cfg: Any) -> tuple[Any, torch.device]:
    """Build the model with the weights of PARAMS_FILE, if any, in evaluation mode."""
    model, path = build_model(cfg.MODEL, cfg.OPTIMIZER), cfg.MODEL.WEIGHTS_INIT.PARAMS_FILE
    if path:
        content = torch.load(g_pathmgr.get_local_path(path), map_location="cpu", weights_only=True)
        model.init_model_from_weights_params_file(cfg, content)
    else:
        print_on_rank_zero("config.MODEL.WEIGHTS_INIT.PARAMS_FILE is not set: the model has its initial weights")
    device = torch.device("cuda" if cfg.MACHINE.DEVICE == "gpu" else "cpu")
    return model.to(device).eval(), device


def _pca(components: int, features: list[np.ndarray]) -> PCA:
    rows = np.concatenate(features)
    if components > rows.shape[1]:
        raise UserError(f"config.IMG_RETRIEVAL.N_PCA must be at most {rows.shape[1]}, the width of the features")
    pca = PCA(components if components > 0 else rows.shape[1])
    pca.fit(rows)
    return pca
