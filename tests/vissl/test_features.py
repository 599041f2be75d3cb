"""Feature extraction, nearest neighbours and linear evaluation of a checkpoint, on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from vissl.models import build_model
from vissl.models.model_helpers import get_trunk_output_feature_names
from vissl.utils.extract_features_utils import ExtractedFeaturesLoader
from vissl.utils.hydra_config import convert_to_attrdict

from plugins.tools.command import UserError
from plugins.tools.features import load_features
from plugins.tools.resnet8 import resnet8
from vissl_ext.compose import compose
from vissl_ext.features import Extractor, FeatureWriter, NearestNeighborEngine, feature_chunks
from vissl_ext.registry import register

register()
pytestmark = pytest.mark.vissl

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FEATURE_ERROR = 1e-4
"""Bound of ‖f − f₆₄‖ / ‖f₆₄‖ for the features f of a network in float32 and f₆₄ in float64.

Roundings of 6e-8 in sums of at most 576 products; random ones give 1.4e-6 a layer, equal ones 3.4e-5.
"""
MEAN, STD = (0.2692, 0.2715, 0.2712), (0.1796, 0.1785, 0.1798)


@pytest.mark.parametrize("threshold", [0, 7, -1])
def test_chunks_hold_every_row_once(threshold: int, tmp_path: Path) -> None:
    """Read back by VISSL's loader and by ours; images that a sampler repeats count once."""
    features, targets = torch.randn(20, 3, 2), torch.arange(20) % 4
    order = torch.cat([torch.randperm(20), torch.tensor([3, 5])])
    writer = FeatureWriter(tmp_path, "train", ["res5"], threshold)
    for rows in order.split(4):
        writer.add(rows, targets[rows], [features[rows]])
    writer.flush()
    chunks = len(list(tmp_path.glob("*_features.npy")))
    assert chunks == {0: 6, 7: 3, -1: 1}[threshold]
    read = ExtractedFeaturesLoader.load_features(str(tmp_path), "train", "res5")
    np.testing.assert_array_equal(read["features"], features.numpy())
    np.testing.assert_array_equal(read["targets"][:, 0], targets.numpy())
    ours, labels = load_features(tmp_path, "train", "res5")
    assert torch.equal(ours, features.flatten(1))
    assert torch.equal(labels, targets)
    # chunk by chunk, in another order
    parts = list(feature_chunks(tmp_path, "train", "res5"))
    assert len(parts) == chunks and sum(len(rows) for rows, _ in parts) == 20
    place = {tuple(row): number for number, row in enumerate(features.flatten(1).tolist())}
    for rows, classes in parts:
        assert [targets[place[tuple(row)]] for row in rows.tolist()] == classes.tolist()


def test_as_many_neighbours_as_there_are_training_images(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("vissl_ext.features.stock.extract_main", lambda *_, **__: None)
    cfg = convert_to_attrdict(compose(["config=benchmark/nearest_neighbor/digits/knn"])[0], dump_config=False)[1]
    (layer,) = get_trunk_output_feature_names(cfg.MODEL)
    (tmp_path / ".knn_features").mkdir()
    for split in ("train", "test"):
        writer = FeatureWriter(tmp_path / ".knn_features", split, [layer], -1)
        writer.add(torch.arange(5), torch.arange(5), [torch.eye(5)])
        writer.flush()
    NearestNeighborEngine().run_engine(cfg, "", "", str(tmp_path))
    assert capsys.readouterr().out == f"kNN of {layer}: top-1 100.00 %, top-5 100.00 % (5 neighbours)\n"


def test_missing_features_raise_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no features of res5 of the test images"):
        list(feature_chunks(tmp_path, "test", "res5"))


@pytest.fixture(autouse=True)
def float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions on a GPU would round to TF32, with 2^-11 in place of 2^-24."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def test_features_of_swavs_head(tmp_path: Path) -> None:
    """SwAV's head returns the embedding and the scores of each set of prototypes as nested lists; stock VISSL fails."""
    words = [
        *("config=feature_extraction/extract_resnet_in1k_8gpu", "+config/feature_extraction/with_head=rn50_swav"),
        *("config.MODEL.TRUNK.NAME=plain_resnet", "config.MODEL.TRUNK.RESNETS.DEPTH=8"),
        "config.MODEL.HEAD.PARAMS=[[swav_head,{dims:[64,16,8],use_bn:true,num_clusters:[5,3]}]]",
    ]
    config = convert_to_attrdict(compose(words)[0], dump_config=False)[1]
    torch.manual_seed(0)
    model = build_model(config.MODEL, config.OPTIMIZER).eval()
    images = torch.randn(6, 3, 16, 16)
    batches = [
        {"data": [images[rows]], "label": [torch.tensor(rows) % 2], "data_idx": [torch.tensor(rows)]}
        for rows in ([4, 0, 2], [1, 5, 3])
    ]
    extractor = Extractor.__new__(Extractor)
    extractor.cfg, extractor._cleanup_task = config, lambda: None
    extractor.task = SimpleNamespace(
        prepare_extraction=lambda pin_memory: None,
        base_model=model,
        available_splits=["TRAIN"],
        dataloaders={"train": DataLoader(batches, batch_size=None)},
        device=torch.device("cpu"),
    )
    extractor.extract(str(tmp_path))
    with torch.no_grad():
        ((embedding, *scores),) = model(images)
    assert [tuple(part.shape) for part in (embedding, *scores)] == [(6, 8), (6, 5), (6, 3)]
    for name, expected in zip(("heads", "heads1", "heads2"), (embedding, *scores), strict=True):
        features, labels = load_features(tmp_path, "train", name)
        torch.testing.assert_close(features, expected)
        assert labels.tolist() == [0, 1] * 3


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory, launch: Any) -> Path:
    """A checkpoint of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    launch(
        "config=pretrain/isoloss/digits",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32",
        "config.OPTIMIZER.num_epochs=2",
        "config.LOSS.isoloss.proj_hidden_dim=32",
        "config.LOSS.isoloss.proj_output_dim=16",
        f"config.CHECKPOINT.DIR={folder}",
    )
    return folder / "model_final_checkpoint_phase1.torch"


def _features(checkpoint: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features and classes of the images, in the order of their paths, by the network alone, in float64."""
    trunk = torch.load(checkpoint, weights_only=False)["classy_state_dict"]["base_model"]["model"]["trunk"]
    network = resnet8()
    network.fc = torch.nn.Identity()
    network.load_state_dict({key.removeprefix("_feature_blocks."): value for key, value in trunk.items()})
    read = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    paths = sorted(folder.glob("*/*.png"))
    images = torch.stack([read(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        return network.eval().double()(images.double()), torch.tensor([int(path.parent.name) for path in paths])


def _reference_knn(
    train: Any, labels: Any, test: Any, truth: Any, k: int, sigma: float, error: float
) -> tuple[float, float]:
    """Every distance, one image at a time: the lowest and highest accuracy of cosines that are within ``error``."""
    right = np.zeros(2, dtype=int)
    for row, true in zip(test.numpy(), truth.tolist(), strict=True):
        cosine = train.numpy() @ row / (np.linalg.norm(train.numpy(), axis=1) * np.linalg.norm(row))
        last, first_outside = np.sort(cosine)[::-1][[k - 1, k]]
        least, most = np.zeros(10), np.zeros(10)  # votes for each class
        for value, label in zip(cosine, labels.tolist(), strict=True):
            if value - error > first_outside + error:  # among the k, whatever the errors are
                least[label] += np.exp((value - error) / sigma)
            if value + error >= last - error:  # among the k for some errors
                most[label] += np.exp((value + error) / sigma)
        others = np.arange(10) != true
        right += [least[true] > most[others].max(), most[true] >= least[others].max()]
    low, high = (100 * right / len(truth)).tolist()
    return low, high


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_extracts_what_the_trunk_computes(
    device: str, on: Callable, trained: Path, few_digits: Path, tmp_path: Path, launch: Callable
) -> None:
    out = launch(
        "config=feature_extraction/digits/extract",
        "engine_name=extract_features",
        *on(device),
        f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={trained}",
        f"config.CHECKPOINT.DIR={tmp_path}",
    )
    for split, folder in (("train", "train"), ("test", "val")):
        features, labels = load_features(tmp_path, split, "res5avg")
        expected, classes = _features(trained, few_digits / folder)
        assert torch.equal(labels, classes)
        errors = torch.linalg.vector_norm(features - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)
        assert errors.max() < FEATURE_ERROR, errors.max()
    counts = [len(load_features(tmp_path, split, "res5avg")[0]) for split in ("train", "test")]
    written = f"wrote the features of {counts[0]} train and {counts[1]} test images (res5avg) to {tmp_path}"
    assert out.splitlines()[-1] == written


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_nearest_neighbours_equal_brute_force(
    device: str, on: Callable, trained: Path, few_digits: Path, tmp_path: Path, launch: Callable
) -> None:
    out = launch(
        "config=benchmark/nearest_neighbor/digits/knn",
        "engine_name=knn",
        *on(device),
        f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={trained}",
        f"config.CHECKPOINT.DIR={tmp_path}",
    )
    train, labels = _features(trained, few_digits / "train")
    test, truth = _features(trained, few_digits / "val")
    # unit vectors differ by no more than the relative error; the cosine adds that of float32, once for each column
    error = 2 * FEATURE_ERROR + (train.shape[1] + 4) * 2.0**-24
    low, high = _reference_knn(train, labels, test, truth, 20, 0.07, error)
    found = json.loads((tmp_path / "knn.json").read_text())["res5avg"]["top1"]
    assert low - 1e-4 <= found <= high + 1e-4
    assert f"kNN of res5avg: top-1 {found:.2f} %" in out
    assert not (tmp_path / ".knn_features").exists()


@pytest.mark.slow
def test_linear_evaluation_trains_the_classifier_alone(
    trained: Path, few_digits: Path, tmp_path: Path, launch: Any
) -> None:
    """VISSL's own configuration: the trunk stays the checkpoint's; the accuracy is that of the trained classifier."""
    launch(
        "config=benchmark/linear_image_classification/digits/eval_resnet8_linear",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32",
        "config.OPTIMIZER.num_epochs=3",
        f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={trained}",
        f"config.CHECKPOINT.DIR={tmp_path}",
    )
    checkpoint = torch.load(tmp_path / "model_final_checkpoint_phase2.torch", weights_only=False)
    model = checkpoint["classy_state_dict"]["base_model"]["model"]
    before = torch.load(trained, weights_only=False)["classy_state_dict"]["base_model"]["model"]["trunk"]
    for name, value in before.items():
        if "num_batches_tracked" not in name:
            assert torch.equal(model["trunk"][f"base_model.{name}"], value), name
    features, classes = _features(trained, few_digits / "val")
    (weight,) = (value.double() for value in model["heads"].values() if value.ndim == 2)
    (bias,) = (value.double() for value in model["heads"].values() if value.ndim == 1)
    hits = (features @ weight.T + bias).argmax(1) == classes
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    logged = [line["test_accuracy_list_meter"] for line in lines if "test_accuracy_list_meter" in line]
    assert logged[-1]["top_1"]["res5avg"] == pytest.approx(100 * float(hits.double().mean()))
    assert logged[-1] != logged[0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"]["test_accuracy_list_meter"] == logged[-1]
