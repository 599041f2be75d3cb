"""Engines svm, svm_low_shot, cluster and retrieval from stock configurations, on a CPU."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.svm import LinearSVC
from torchvision import transforms
from vissl.config import AttrDict
from vissl.utils.svm_utils import svm_trainer
from vissl.utils.svm_utils.evaluate import get_precision_recall

from plugins.tools.command import UserError
from plugins.tools.svm import Settings, class_targets, evaluate, unit_rows
from vissl_ext import load_model
from vissl_ext.checks import check, check_engine
from vissl_ext.compose import compose
from vissl_ext.registry import register
from vissl_ext.retrieval import LandmarkDataset, _listed_images

register()
pytestmark = pytest.mark.vissl

CLASSES = ("aeroplane", "bicycle", "bird")
TRUNK = ("config.MODEL.TRUNK.NAME=plain_resnet", "config.MODEL.TRUNK.RESNETS.DEPTH=8")
LAYERS = "config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP"
VOC = (
    *TRUNK,
    f"{LAYERS}=[[res4,[AvgPool2d,[[8,8],1,0]]],[res5avg,[Identity,[]]]]",
    "config.DATA.NUM_DATALOADER_WORKERS=0",
    "config.SVM.costs.costs_list=[0.1,1,10]",
    *(f"config.DATA.{split}.COPY_TO_LOCAL_DISK=false" for split in ("TRAIN", "TEST")),
    *(f"config.DATA.{split}.DATA_PATHS=[voc/{split.lower()}_images.npy]" for split in ("TRAIN", "TEST")),
    *(f"config.DATA.{split}.LABEL_PATHS=[voc/{split.lower()}_labels.npy]" for split in ("TRAIN", "TEST")),
)


@pytest.fixture(scope="module")
def work(few_digits: Path, launch: Callable) -> Path:
    """The folder in which the commands run, with a checkpoint, VOC07's files and roxford5k's."""
    folder = few_digits.parents[1]
    launch(
        "config=pretrain/isoloss/digits",
        *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32", "config.OPTIMIZER.num_epochs=1"),
        *("config.LOSS.isoloss.proj_hidden_dim=32", "config.LOSS.isoloss.proj_output_dim=16"),
        f"config.CHECKPOINT.DIR={folder / 'run'}",
    )
    return folder


WEIGHTS = "config.MODEL.WEIGHTS_INIT.PARAMS_FILE=run/checkpoint.torch"


# VOC07


def _voc_labels(digit: int, number: int) -> list[int]:
    """VOC's own labels of an image: 1 present, -1 absent, 0 difficult."""
    present = [digit % 2 == 0, digit >= 5, digit % 3 == 0]
    return [0 if (number + place) % 11 == 0 else 1 if there else -1 for place, there in enumerate(present)]


@pytest.fixture(scope="module")
def voc(work: Path) -> dict[str, np.ndarray]:
    """Split → the labels [N, 3] of 1, 0 and -1, from a folder VOC2007 that VISSL's script reads."""
    root, expected = work / "VOCdevkit" / "VOC2007", {}
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (work / "voc").mkdir()
    for split, folder in (("trainval", "train"), ("test", "val")):
        names = {}
        for number, path in enumerate(sorted((work / "datasets" / "digits" / folder).glob("*/*.png"))):
            name = f"{split}{number:06d}"
            Image.open(path).convert("RGB").save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            names[name] = _voc_labels(int(path.parent.name), number)
        for place, kind in enumerate(CLASSES):
            lines = [f"{name} {labels[place]:2d}\n" for name, labels in names.items()]
            (root / "ImageSets" / "Main" / f"{kind}_{split}.txt").write_text("".join(lines))
        of_vissl = {1: 1, -1: 0, 0: -1}
        expected[folder] = np.array([[of_vissl[label] for label in names[name]] for name in sorted(names)])
    script = ["-m", "extra_scripts.datasets.create_voc_data_files", "--data_source_dir", str(root)]
    subprocess.run([sys.executable, *script, "--output_dir", str(work / "voc")], check=True, capture_output=True)
    return expected


def test_vissls_script_writes_the_labels_of_voc(work: Path, voc: dict) -> None:
    for split, folder in (("train", "train"), ("test", "val")):
        assert np.array_equal(np.load(work / "voc" / f"{split}_labels.npy"), voc[folder])


def _reference_precision(scores: Any, positive: Any) -> float:
    """Average precision with the largest precision at each recall or above, by its definition."""
    ranked = [bool(positive[i]) for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
    curve = [sum(ranked[:rank]) / rank for rank in range(1, len(ranked) + 1)]
    return sum(max(curve[place:]) for place, hit in enumerate(ranked) if hit) / sum(ranked)


def _features(work: Path, folder: str, files: list[str], pool: bool) -> np.ndarray:
    """Features of images by the network alone, in float64."""
    model = load_model(work / "run").double()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    read = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(mean, std)])
    images = torch.stack([read(Image.open(work / folder / name)) for name in files]).double()
    with torch.no_grad():
        found = model(images) if not pool else torch.nn.functional.avg_pool2d(model(images, ["res4"])[0], 8).flatten(1)
    return (found / (found.norm(dim=1, keepdim=True) + 1e-5)).numpy()


@pytest.mark.slow
def test_svm_of_the_stock_configuration(work: Path, voc: dict, launch: Callable) -> None:
    """Costs by cross-validation; ignored labels are negatives in the training and do not count in the test."""
    small = [f"config.DATA.{split}.TRANSFORMS.{place}.size=[32,32]" for split in ("TRAIN", "TEST") for place in (0, 1)]
    out = launch(
        "config=benchmark/linear_image_classification/voc07/eval_resnet_8gpu_transfer_voc07_svm",
        *("engine_name=svm", WEIGHTS, *VOC, *small, f"config.CHECKPOINT.DIR={work / 'svm'}"),
    )
    found = json.loads((work / "svm" / "metrics.json").read_text())["svm"]
    assert list(found) == ["res4", "res5avg"]
    files = {
        split: [Path(path).name for path in np.load(work / "voc" / f"{split}_images.npy")]
        for split in ("train", "test")
    }
    for layer, result in found.items():
        place = "VOCdevkit/VOC2007/JPEGImages"
        train, test = (_features(work, place, files[split], layer == "res4") for split in ("train", "test"))
        for number in range(3):
            signs = np.where(voc["train"][:, number] == 1, 1, -1)
            assert result["cost"][number] in (0.1, 1, 10)
            machine = LinearSVC(C=result["cost"][number], class_weight={1: 2, -1: 1}, max_iter=2000, random_state=0)
            used = voc["val"][:, number] != -1
            assert 0 < used.sum() < len(used)
            scores = machine.fit(train, signs).decision_function(test[used])
            expected = 100 * _reference_precision(scores, voc["val"][used, number] == 1)
            # float32 features may swap two images of almost equal score
            assert result["AP"][number] == pytest.approx(expected, abs=1.0)
        assert result["mAP"] == pytest.approx(np.mean(result["AP"]))
        assert f"svm of {layer}: mAP {result['mAP']:.2f} % (3 classes)" in out
    assert not (work / "svm" / ".svm_features").exists()


def test_svm_agrees_with_vissls_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cross-validated precisions for each cost, and the same definition of average precision."""
    rng, classes = np.random.default_rng(0), np.arange(120) % 3
    features = rng.normal(size=(120, 6)) + 2.0 * np.eye(6)[classes]
    targets = class_targets(classes)
    targets[rng.random(targets.shape) < 0.1] = -1
    words = ["config=benchmark/linear_image_classification/voc07/eval_resnet_8gpu_transfer_voc07_svm"]
    cfg = compose([*words, "config.SVM.costs.costs_list=[0.1,1]"])[0]
    monkeypatch.setattr(svm_trainer.LinearSVC, "fit", _seeded(LinearSVC.fit))
    monkeypatch.setattr(svm_trainer.threading, "Thread", _Now)
    section = AttrDict(OmegaConf.to_container(cfg.config.SVM))
    trainer = svm_trainer.SVMTrainer(section, layer="res5", output_dir=str(tmp_path))
    trainer.train(features[:80], targets[:80])
    train, test = unit_rows(features[:80]), unit_rows(features[80:])
    ours = evaluate(train, targets[:80], test, targets[80:], Settings(costs=(0.1, 1.0)))
    assert trainer.train_ap_matrix == pytest.approx(ours.validated, abs=1e-12)
    for number, cost in enumerate(trainer.get_best_cost_value()):
        assert ours.costs[number] == cost
        machine = pickle.loads((tmp_path / "res5" / f"cls{number}_cost{cost}.pickle").read_bytes())
        used = targets[80:, number] != -1
        found = get_precision_recall(targets[80:][used, number], machine.decision_function(test[used]))[3]
        assert float(np.squeeze(found)) == pytest.approx(ours.precisions[number], abs=1e-12)


def _seeded(fit: Callable) -> Callable:
    def seeded(self: Any, *args: Any) -> Any:
        self.random_state, self.verbose = 0, 0
        return fit(self, *args)

    return seeded


class _Now:
    """A thread that runs when it is started, so that all draw the same numbers."""

    def __init__(self, target: Callable, args: tuple) -> None:
        self.start = lambda: target(*args)

    def join(self) -> None:
        pass


@pytest.mark.slow
def test_low_shot_svm_of_the_stock_configuration(work: Path, voc: dict, launch: Callable) -> None:
    words = (
        "config=benchmark/low_shot_transfer/voc07/eval_resnet_8gpu_transfer_voc07_low_shot_svm",
        *("engine_name=svm_low_shot", WEIGHTS, *VOC, "config.SVM.low_shot.k_values=[1,12]"),
        *(f"config.DATA.{split}.TRANSFORMS.0.size=[32,32]" for split in ("TRAIN", "TEST")),
        "config.SVM.low_shot.sample_inds=[1,2,3]",
    )
    out = launch(*words, f"config.CHECKPOINT.DIR={work / 'shots'}")
    found = json.loads((work / "shots" / "metrics.json").read_text())["svm_low_shot"]
    for layer, rows in found.items():
        assert list(rows) == ["k=1", "k=12"]
        for name, row in rows.items():
            assert 0 < row["min"] <= row["mean"] <= row["max"] <= 100 and row["cost"] in (0.1, 1, 10)
            assert f"svm_low_shot of {layer}: {name}  mAP {row['mean']:.2f} %" in out
        assert rows["k=1"]["std"] > 0 and rows["k=12"]["mean"] > rows["k=1"]["mean"]


# clusters


def _cluster(launch: Callable, folder: Path, *words: str) -> dict[str, np.ndarray]:
    launch(
        "config=pretrain/clusterfit/cluster_features_resnet_8gpu_imagenet",
        *("engine_name=cluster", WEIGHTS, *TRUNK, f"{LAYERS}=[[res5avg,[Identity,[]]]]"),
        *("config.DATA.TRAIN.DATA_PATHS=[datasets/digits/train]", "config.DATA.TEST.DATA_PATHS=[datasets/digits/val]"),
        *(f"config.DATA.{split}.TRANSFORMS.0.size=16" for split in ("TRAIN", "TEST")),
        *(f"config.DATA.{split}.TRANSFORMS.1.size=16" for split in ("TRAIN", "TEST")),
        *("config.CLUSTERFIT.FEATURES.LAYER_NAME=res5avg", "config.CLUSTERFIT.FEATURES.DATASET_NAME=digits"),
        *("config.DATA.NUM_DATALOADER_WORKERS=0", "config.CLUSTERFIT.NUM_CLUSTERS=6", *words),
        f"config.CHECKPOINT.DIR={folder}",
    )
    return {path.name: np.load(path) for path in folder.glob("digits_*.npy")}


@pytest.fixture(scope="module")
def clusters(work: Path, launch: Callable) -> dict[str, np.ndarray]:
    return _cluster(launch, work / "clusters", "config.CLUSTERFIT.FEATURES.EXTRACT=true")


@pytest.mark.slow
def test_labels_are_the_nearest_centroids_and_centroids_the_means(work: Path, clusters: dict) -> None:
    centroids = clusters["digits_train_res5avg_N6_D64_centroids.npy"].astype(np.float64)
    for split, folder in (("train", "train"), ("test", "val")):
        rows = np.load(work / "clusters" / "features" / f"rank0_chunk0_{split}_res5avg_features.npy").astype(np.float64)
        rows = rows.reshape(len(rows), -1)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5
        labels, distances = (clusters[f"digits_{split}_res5avg_N6_D64_{kind}.npy"] for kind in ("labels", "distances"))
        for row, label, distance in zip(rows, labels, distances, strict=True):
            each = [float(((row - centroid) ** 2).sum()) for centroid in centroids]
            assert distance == pytest.approx(each[label], abs=1e-6) and each[label] <= min(each) + 1e-6
        images = clusters[f"digits_{split}_res5avg_N6_D64_images.npy"]
        expected = sorted((work / "datasets" / "digits" / folder).glob("*/*.png"))
        assert [Path(path).resolve() for path in images] == [path.resolve() for path in expected]
        if split == "train":
            for label in set(labels.tolist()):
                mean = rows[labels == label].mean(0)
                assert centroids[label] == pytest.approx(mean, abs=1e-5)
            assert len(set(labels.tolist())) > 2


@pytest.mark.slow
def test_clusters_depend_on_the_seed_alone_and_on_features_of_an_earlier_command(
    work: Path, clusters: dict, launch: Callable
) -> None:
    path = f"config.CLUSTERFIT.FEATURES.PATH={work / 'clusters' / 'features'}"
    again = _cluster(launch, work / "again", path)
    assert again.keys() == clusters.keys() and len(again) == 8
    assert all(np.array_equal(again[name], clusters[name]) for name in again)
    other = _cluster(launch, work / "other", path, "config.SEED_VALUE=7")
    name = "digits_train_res5avg_N6_D64_centroids.npy"
    assert not np.array_equal(other[name], clusters[name])


@pytest.mark.slow
def test_a_pca_subtracts_the_mean_once(work: Path, clusters: dict, launch: Callable) -> None:
    words = (f"config.CLUSTERFIT.FEATURES.PATH={work / 'clusters' / 'features'}", "config.CLUSTERFIT.NUM_ITER=100")
    found = _cluster(launch, work / "pca", *words, "config.CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION=4")
    kinds = ("labels", "centroids")
    labels, centroids = (found[f"digits_train_res5avg_N6_D4_{kind}.npy"] for kind in kinds)
    # the mean of the centroids over the images is that of the reduced features, which is zero
    assert centroids[labels].mean(0) == pytest.approx(np.zeros(4), abs=1e-4)
    assert np.abs(centroids).max() > 1e-2


@pytest.mark.slow
def test_clusters_are_the_labels_of_clusterfit(work: Path, clusters: dict, launch: Callable) -> None:
    prefix = "clusters/digits_train_res5avg_N6_D64"
    out = launch(
        "config=pretrain/clusterfit/clusterfit_resnet_8gpu_imagenet",
        *(
            f"config.DATA.TRAIN.DATA_PATHS=[{prefix}_images.npy]",
            f"config.DATA.TRAIN.LABEL_PATHS=[{prefix}_labels.npy]",
        ),
        *(*TRUNK, "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[64,6]}]]", "config.DATA.TRAIN.TRANSFORMS.0.size=16"),
        *("config.OPTIMIZER.num_epochs=1", "config.OPTIMIZER.param_schedulers.lr={name:constant,value:0.01}"),
        *("config.DATA.NUM_DATALOADER_WORKERS=0", f"config.CHECKPOINT.DIR={work / 'clusterfit'}"),
    )
    assert re.search(r"train top_1 clusters [\d.]+", out) and (work / "clusterfit" / "checkpoint.torch").exists()


# retrieval


@pytest.fixture(scope="module")
def revisited(work: Path) -> dict[str, Any]:
    """roxford5k of a few digits, in VISSL's layout, and its ground truth."""
    root = work / "retrieval" / "roxford5k"
    (root / "jpg").mkdir(parents=True)
    paths = sorted((work / "datasets" / "digits" / "val").glob("*/*.png"))
    for number, path in enumerate(paths):
        size = (24, 16 + number % 3)  # of several sizes
        Image.open(path).convert("RGB").resize(size).save(root / "jpg" / f"{path.parent.name}_{number}.jpg")
    names = [f"{path.parent.name}_{number}" for number, path in enumerate(paths)]
    queries, truth = names[::7], []
    for query in queries:
        same = [i for i, name in enumerate(names) if name[0] == query[0] and name != query]
        truth.append({"easy": same[:1], "hard": same[1:], "junk": [names.index(query)], "bbx": [1.0, 2.0, 20.0, 15.0]})
    content = {"imlist": names, "qimlist": queries, "gnd": truth}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    other = work / "retrieval" / "others"
    other.mkdir()
    for number, path in enumerate(sorted((work / "datasets" / "digits" / "train").glob("*/*.png"))[::4]):
        Image.open(path).convert("RGB").save(other / f"{number}.jpg")
    return content


RETRIEVAL = (
    "config=benchmark/instance_retrieval/eval_resnet_1gpu_roxford",
    *("engine_name=retrieval", WEIGHTS, *TRUNK, "config.IMG_RETRIEVAL.RESIZE_IMG=32"),
)


def _reference_retrieval(ranking: list[int], relevant: list[int], junk: list[int]) -> tuple[float, dict[int, float]]:
    """Area under the trapezoids of precision over recall, without the junk, and precision at k."""
    kept = [image for image in ranking if image not in junk]
    area = 0.0
    for count, image in enumerate(relevant_places := [i for i, image in enumerate(kept) if image in relevant]):
        before = count / image if image else 1.0
        area += (before + (count + 1) / (image + 1)) / 2 / len(relevant)
    at = {}
    for k in (1, 5, 10):
        last = min(k, max(relevant_places) + 1)  # all relevant images may come before the k-th
        at[k] = sum(image in relevant for image in kept[:last]) / last
    return area, at


@pytest.mark.slow
@pytest.mark.parametrize(
    "pooling",
    [
        ["FEATS_PROCESSING_TYPE=rmac", "N_PCA=16", "TRAIN_DATASET_NAME=others"],
        ["FEATS_PROCESSING_TYPE=gem", "TRAIN_PCA_WHITENING=false", "IMG_SCALINGS=[1,0.5]", "CROP_QUERY_ROI=true"],
    ],
    ids=["rmac", "gem"],
)
def test_retrieval_of_the_stock_configuration(pooling: list, work: Path, revisited: dict, launch: Callable) -> None:
    folder = work / pooling[0].partition("=")[2]
    words = [f"config.IMG_RETRIEVAL.{word}" for word in pooling]
    out = launch(*RETRIEVAL, *words, "config.IMG_RETRIEVAL.DATASET_PATH=retrieval", f"config.CHECKPOINT.DIR={folder}")
    found = json.loads((folder / "metrics.json").read_text())
    rankings = json.loads((folder / "rankings.json").read_text())
    scores = np.array(json.loads((folder / "similarity_scores.json").read_text())).T
    assert [sorted(range(len(row)), key=lambda i: -row[i]) for row in scores.tolist()] == rankings
    kinds = {"e": (("easy",), ("junk", "hard")), "m": (("easy", "hard"), ("junk",)), "h": (("hard",), ("junk", "easy"))}
    for kind, (good, bad) in kinds.items():
        results = [
            _reference_retrieval(
                ranking, [i for name in good for i in truth[name]], [i for name in bad for i in truth[name]]
            )
            for ranking, truth in zip(rankings, revisited["gnd"], strict=True)
        ]
        assert found["mAP"][kind] == pytest.approx(np.mean([area for area, _ in results]), abs=1e-9)
        for place, k in enumerate(found["mp@k"]["k"]):
            assert found["mp@k"][kind][place] == pytest.approx(np.mean([at[k] for _, at in results]), abs=1e-9)
    assert f"retrieval in roxford5k: easy mAP {100 * found['mAP']['e']:.2f} %, medium mAP" in out
    # unit vectors; a whole query is most similar to itself
    itself = [revisited["imlist"].index(name) for name in revisited["qimlist"]]
    own = scores[np.arange(len(itself)), itself]
    assert np.abs(scores).max() <= 1 + 1e-4
    if "rmac" in pooling[0]:
        assert own == pytest.approx(np.ones(len(own)), abs=1e-4)
        assert [ranking[0] for ranking in rankings] == itself
    else:  # of a region
        assert (own < 1 - 1e-4).all()


@pytest.mark.slow
def test_gem_is_the_mean_power_of_the_map(work: Path, revisited: dict, launch: Callable) -> None:
    """Each image of a class folder is a query for the others of its class."""
    folder = work / "folder"
    words = ("EVAL_DATASET_NAME=folder", "DATASET_PATH=datasets/digits/val", "FEATS_PROCESSING_TYPE=gem")
    words = (*words, "TRAIN_PCA_WHITENING=false", "GEM_POOL_POWER=2.0", "SAVE_FEATURES=true")
    out = launch(*RETRIEVAL, *(f"config.IMG_RETRIEVAL.{word}" for word in words), f"config.CHECKPOINT.DIR={folder}")
    paths = sorted((work / "datasets" / "digits" / "val").glob("*/*.png"))
    model = load_model(work / "run").double()
    read = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    rows = []
    for path in paths:
        image = Image.open(path).convert("RGB").resize((32, 32), Image.BILINEAR)
        with torch.no_grad():
            map_ = model(read(image).double()[None], ["res5"])[0][0].numpy()
        pooled = np.append(np.sqrt(np.mean(np.maximum(map_, 1e-6) ** 2, axis=(1, 2))), 1.0)
        rows.append(pooled / np.linalg.norm(pooled))
    features = np.load(folder / "features_images.npy")
    assert features == pytest.approx(np.array(rows), abs=1e-4)
    precisions = []
    for query, path in enumerate(paths):
        ranking = np.argsort(-(features @ features[query]), kind="stable").tolist()
        same = [i for i, other in enumerate(paths) if other.parent == path.parent and i != query]
        precisions.append(_reference_retrieval(ranking, same, [query])[0])
    found = json.loads((folder / "metrics.json").read_text())
    assert found["mAP"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert f"retrieval in folder: mAP {100 * found['mAP']:.2f} %; precision at 1, 5, 10: " in out


@pytest.mark.slow
def test_copydays(work: Path, revisited: dict, launch: Callable) -> None:
    """Each set of queries has its scores; the numbers of an image and of its original have the same hundreds."""
    root = work / "retrieval" / "copydays"
    paths = sorted((work / "datasets" / "digits" / "val").glob("*/*.png"))[::4]
    for name in ("queries", "database"):
        (root / name).mkdir(parents=True)
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        image.save(root / "database" / f"{200000 + 100 * number}.jpg", quality=95)
        image.rotate(25).save(root / "queries" / f"strong_{200001 + 100 * number}.jpg", quality=95)
    words = ("EVAL_DATASET_NAME=copydays", "DATASET_PATH=retrieval", "TRAIN_DATASET_NAME=others", "N_PCA=16")
    words = (*words, "RESIZE_IMG=32", "USE_DISTRACTORS=false", "SIMILARITY_MEASURE=l2")
    out = launch(
        "config=benchmark/instance_retrieval/eval_resnet_1gpu_copydays",
        *("engine_name=retrieval", WEIGHTS, *TRUNK, *(f"config.IMG_RETRIEVAL.{word}" for word in words)),
        f"config.CHECKPOINT.DIR={work / 'copies'}",
    )
    found = json.loads((work / "copies" / "metrics.json").read_text())
    rankings = json.loads((work / "copies" / "rankings.json").read_text())
    results = [_reference_retrieval(ranking, [query], [])[0] for query, ranking in enumerate(rankings)]
    assert list(found) == ["strong"] and found["strong"]["mAP"] == pytest.approx(np.mean(results), abs=1e-9)
    assert f"retrieval in copydays: strong: mAP {100 * np.mean(results):.2f} %" in out


@pytest.mark.slow
def test_oxford_and_a_whitening_list(work: Path, revisited: dict, launch: Callable) -> None:
    """Regions as queries, lists good, ok and junk; a corrupt image of Paris is left out, as are those of no list."""
    root = work / "retrieval" / "Oxford"
    (root / "lab").mkdir(parents=True)
    names = sorted(revisited["imlist"])
    for place, name in enumerate(names):
        (root / "jpg" / str(place % 2)).mkdir(parents=True, exist_ok=True)  # the archive of Paris6k has subfolders
        source = work / "retrieval" / "roxford5k" / "jpg" / f"{name}.jpg"
        (root / "jpg" / str(place % 2) / f"{name}.jpg").write_bytes(source.read_bytes())
    (root / "jpg" / "paris_louvre_000136.jpg").write_bytes(b"")
    order = [*names[::2], *names[1::2]]  # of the paths
    wanted = []
    for query in names[::9]:
        same = [name for name in names if name[0] == query[0]]
        lists = {"good": same[:2], "ok": [*same[2:], "not_there"], "junk": [name for name in names if name[0] == "8"]}
        for kind, listed in lists.items():
            (root / "lab" / f"q_{query}_1_{kind}.txt").write_text("".join(f"{name}\n" for name in listed))
        (root / "lab" / f"q_{query}_1_query.txt").write_text(f"oxc1_{query} 1.0 2.5 20.0 15.0\n")
        wanted.append([[order.index(name) for name in listed] for listed in (same, lists["junk"])])
    (work / "list.txt").write_text("".join(f"{number}.jpg\n" for number in range(20)))
    words = ("EVAL_DATASET_NAME=Oxford", "DATASET_PATH=retrieval", "TRAIN_DATASET_NAME=others", "N_PCA=16")
    words = (*words, "WHITEN_IMG_LIST=list.txt", "FEATS_PROCESSING_TYPE=gem", "CROP_QUERY_ROI=true")
    out = launch(
        *RETRIEVAL, *(f"config.IMG_RETRIEVAL.{word}" for word in words), f"config.CHECKPOINT.DIR={work / 'ox'}"
    )
    found = json.loads((work / "ox" / "metrics.json").read_text())
    rankings = json.loads((work / "ox" / "rankings.json").read_text())
    assert [len(ranking) for ranking in rankings] == [40] * 5
    results = [_reference_retrieval(ranking, *lists) for ranking, lists in zip(rankings, wanted, strict=True)]
    assert found["mAP"] == pytest.approx(np.mean([area for area, _ in results]), abs=1e-9)
    assert f"retrieval in Oxford: mAP {100 * found['mAP']:.2f} %; precision at 1, 5, 10: " in out


def test_the_files_of_oxford_and_a_whitening_list_are_checked(tmp_path: Path) -> None:
    (tmp_path / "jpg").mkdir()
    (tmp_path / "lab").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "jpg" / "a.jpg")
    with pytest.raises(UserError, match=r"there are no files NAME_query\.txt in "):
        LandmarkDataset(tmp_path)
    query = tmp_path / "lab" / "q_1_query.txt"
    query.write_text("oxc1_b 0 0 8 8")
    with pytest.raises(UserError, match=r"there is no file .*q_1_good\.txt"):
        LandmarkDataset(tmp_path)
    for kind in ("good", "ok", "junk"):
        (tmp_path / "lab" / f"q_1_{kind}.txt").touch()
    with pytest.raises(UserError, match=r"q_1_query\.txt must name an image of .*jpg and four coordinates"):
        LandmarkDataset(tmp_path)
    query.write_text("oxc1_a 0 1.5 8 7")
    dataset = LandmarkDataset(tmp_path)
    assert dataset.get_query_filename(0) == dataset.get_filename(0) and dataset.get_query_roi(0) == [0, 1.5, 8, 7]
    listed = tmp_path / "list.txt"
    with pytest.raises(UserError, match=r"WHITEN_IMG_LIST: there is no file .*list\.txt"):
        _listed_images(tmp_path / "jpg", listed)
    for text, message in (("\n", "lists no image"), ("a.jpg\nb.jpg\n", "lists b.jpg, which is not in ")):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            _listed_images(tmp_path / "jpg", listed)


# errors


_SVM = "config=benchmark/linear_image_classification/voc07/eval_resnet_8gpu_transfer_voc07_svm"
_SHOTS = "config=benchmark/low_shot_transfer/voc07/eval_resnet_8gpu_transfer_voc07_low_shot_svm"
_CLUSTER = "config=pretrain/clusterfit/cluster_features_resnet_8gpu_imagenet"
_ROXFORD = "config=benchmark/instance_retrieval/eval_resnet_1gpu_roxford"
_RETRIEVAL, _CLUSTERFIT = "config.IMG_RETRIEVAL", "config.CLUSTERFIT"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["svm", _SVM, "config.SVM.costs.costs_list=[0]"], "config.SVM: the costs must be positive numbers, got [0.0]"),
        (["svm", _SVM, "config.SVM.loss=huber"], "config.SVM: The 'loss' parameter of LinearSVC must be"),
        (["svm", _SVM, "config.SVM.cross_val_folds=1"], "the number of folds must be at least 2, got 1"),
        (["svm", _SVM, "config.SVM.cls_list=[a]"], "config.SVM.cls_list must be a list of integers of at least 0"),
        (["svm", _SVM, "config.TEST_MODEL=false"], "engine_name=svm classifies the test images: set config.TEST_MODEL"),
        (["svm", _SVM, "config.DATA.TRAIN.LABEL_PATHS=[no.npy]"], "config.DATA.TRAIN.LABEL_PATHS: there is no file no"),
        (["svm", _SVM, "config.DATA.TRAIN.LABEL_PATHS=[few.npy]"], "class 1 has 2 training images, but config.SVM.cro"),
        (
            ["svm_low_shot", _SHOTS, "config.DATA.TRAIN.LABEL_PATHS=[few.npy]"],
            "class 0 has 3 training images, but the low-shot evaluation with k=96 needs 96 of each class",
        ),
        (
            ["svm", "config=benchmark/nearest_neighbor/digits/knn", "config.DATA.TRAIN.DATA_PATHS=[classes]"],
            "class 1 has 1 training images, but config.SVM.cross_val_folds=3 needs 3 of each class",
        ),
        (["svm_low_shot", _SHOTS, "config.SVM.low_shot.k_values=[0]"], "k_values must be a list of integers of at lea"),
        (
            ["cluster", _CLUSTER, f"{_CLUSTERFIT}.NUM_CLUSTERS=0"],
            "NUM_CLUSTERS must be an integer, at least 1, got 0",
        ),
        (["cluster", _CLUSTER], "contains no features of res5 of the train images; extract them with config.CLUSTERF"),
        (["cluster", _CLUSTER, f"{_CLUSTERFIT}.FEATURES.DATA_PARTITION=VAL"], "DATA_PARTITION must be TRAIN or TEST"),
        (["cluster", _CLUSTER, "config.TEST_MODEL=false"], "set config.TEST_MODEL=true, or TEST_PARTITION=''"),
        (
            ["cluster", _CLUSTER, f"{_CLUSTERFIT}.FEATURES.EXTRACT=true", f"{_CLUSTERFIT}.FEATURES.LAYER_NAME=res3"],
            "LAYER_NAME must be a layer whose features are extracted, res5, got 'res3'",
        ),
        (["retrieval", _ROXFORD, f"{_RETRIEVAL}.EVAL_DATASET_NAME=instre"], "EVAL_DATASET_NAME must be one of 'roxfor"),
        (
            ["retrieval", _ROXFORD, f"{_RETRIEVAL}.EVAL_DATASET_NAME=Paris", f"{_RETRIEVAL}.DATASET_PATH=/no"],
            "Paris needs /no/Paris/jpg, which does not exist",
        ),
        (["retrieval", _ROXFORD, f"{_RETRIEVAL}.FEATS_PROCESSING_TYPE=max"], "must be one of 'rmac', 'gem', '', got"),
        (["retrieval", _ROXFORD, f"{_RETRIEVAL}.IMG_SCALINGS=[1,2]"], "rmac needs TRAIN_PCA_WHITENING=true and one sc"),
        (["retrieval", _ROXFORD, f"{_RETRIEVAL}.DATASET_PATH=/no"], "roxford5k needs /no/roxford5k/jpg, which does no"),
        (
            ["retrieval", _ROXFORD, "config.MODEL.FEATURE_EVAL_SETTINGS.SHOULD_FLATTEN_FEATS=true"],
            "pools feature maps: set config.MODEL.FEATURE_EVAL_SETTINGS.SHOULD_FLATTEN_FEATS=false",
        ),
        (["retrieval", _ROXFORD, f"{LAYERS}=[[res4,[Identity,[]]],[res5,[Identity,[]]]]"], "the features of one layer"),
        (["retrieval", _ROXFORD, "config.DISTRIBUTED.NUM_PROC_PER_NODE=2"], "retrieval runs in one process"),
        (
            ["retrieval", _ROXFORD, f"{_RETRIEVAL}.EVAL_DATASET_NAME=folder", f"{_RETRIEVAL}.DATASET_PATH=empty"],
            "must have one subfolder per class, and two images in one of them",
        ),
    ],
)
def test_invalid_settings_raise_a_one_line_error(
    words: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / name).touch()
    np.save("few.npy", np.array([[1, 0], [1, 0], [1, 1], [0, 1]]))
    engine, *words = words
    cfg, given = compose([*words, f"engine_name={engine}", f"config.CHECKPOINT.DIR={tmp_path}"])
    check(cfg, given)
    with pytest.raises(UserError, match=re.escape(message)):
        check_engine(engine, cfg.config)
