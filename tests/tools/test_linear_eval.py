"""Probes of features without a framework: sources of the features, output, errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from plugins.heads import expand_resnet_dim
from plugins.tools import linear_eval
from plugins.tools.command import UserError
from plugins.tools.features import load_arrays, load_features, save_features
from plugins.tools.probe import evaluate_probe
from plugins.tools.probe_file import read_probes
from plugins.tools.weights import load_dissl, preprocessor


def blobs(rows, *, seed=0, classes=3, dim=5, spread=1.0):
    """Separated classes, in numpy."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    features = 4 * np.eye(dim)[:classes][labels] + spread * rng.standard_normal((rows, dim))
    return features.astype(np.float32), labels


@pytest.fixture
def files(tmp_path) -> list[str]:
    """The options that name two pairs of files."""
    for split, (features, labels) in {"train": blobs(90), "test": blobs(60, seed=1)}.items():
        np.save(tmp_path / f"{split}_x.npy", features)
        np.save(tmp_path / f"{split}_y.npy", labels)
    return [
        part
        for split in ("train", "test")
        for part in (f"--{split}", str(tmp_path / f"{split}_x.npy"), str(tmp_path / f"{split}_y.npy"))
    ]


@pytest.fixture
def quick(tmp_path) -> list[str]:
    """The option that names a file of two probes."""
    grid = [{"weight_decay": [0.5, 1e-4], "lr": 0.3}, {"weight_decay": 0, "lr": 0.01, "optimizer": "adamw"}]
    probes = [{"kind": "linear", "grid": grid}, {"kind": "logistic", "C": 1.0}]
    (tmp_path / "quick.yaml").write_text(json.dumps({"probes": probes, "epochs": 5, "batch_size": 32}))
    return ["--config", str(tmp_path / "quick.yaml"), "--device", "cpu"]


def run(*options: str):
    return linear_eval.evaluate(linear_eval.parser().parse_args(list(options)))


@pytest.mark.parametrize("select", ["validation", "test"])
def test_two_pairs_of_files(files, quick, select, tmp_path, capsys):
    found = run(*files, *quick, "--select", select, "--seed", "2", "--output", str(tmp_path / "new" / "out.json"))
    sides = [tuple(map(torch.from_numpy, side)) for side in (blobs(90), blobs(60, seed=1))]
    probes = read_probes(tmp_path / "quick.yaml")
    assert found == [evaluate_probe(*sides, probe, select=select, seed=2) for probe in probes]
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == found
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 2
    assert lines[0].split() == ["probe", "setting", "top-1", "top-5", "held-out", "top-1"]
    assert [line.split()[0] for line in lines[1:5]] == ["linear"] * 3 + ["logistic"]
    assert lines[4].endswith("*") and sum(line.endswith("*") for line in lines[1:4]) == 1
    (chosen,) = [row for row, line in zip(found[0]["grid"], lines[1:4], strict=True) if line.endswith("*")]
    best = "acc1" if select == "test" else "validation_acc1"
    assert chosen[best] == max(row[best] for row in found[0]["grid"])
    assert f"{found[0]['acc1']:.2f}" in lines[5] and f"chosen on the {select} images" in lines[5]
    assert lines[6].startswith("logistic probe, 90 labels: top-1 ") and "chosen" not in lines[6]


@pytest.mark.slow
def test_published_grid_separates_what_is_separable(tmp_path, files):
    for split, seed in (("train", 0), ("test", 1)):
        features, labels = blobs(90, seed=seed, spread=0.1)
        np.save(tmp_path / f"{split}_x.npy", features)
        np.save(tmp_path / f"{split}_y.npy", labels)
    (row,) = run(*files, "--device", "cpu")
    assert len(row["grid"]) == 19 and row["acc1"] == row["acc5"] == 100


def _vissl(folder: Path, features, labels, *, split="train", layer="res5", ranks=2, chunks=2):
    """Write the files of two processes: each has every second image, and both have the first."""
    order = np.random.default_rng(0).permutation(len(labels))
    for rank in range(ranks):
        mine = np.append(order[rank::ranks], order[0])
        for chunk, rows in enumerate(np.array_split(mine, chunks)):
            stem = folder / f"rank{rank}_chunk{chunk}_{split}_{layer}"
            rows = np.sort(rows)
            np.save(f"{stem}_features.npy", features[rows].reshape(len(rows), -1, 1, 1))
            np.save(f"{stem}_targets.npy", labels[rows].reshape(-1, 1))
            np.save(f"{stem}_inds.npy", rows)


def test_folder_of_extract_features(files, quick, tmp_path):
    folder = tmp_path / "extracted"
    folder.mkdir()
    _vissl(folder, *blobs(90))
    _vissl(folder, *blobs(60, seed=1), split="test")
    wanted = run(*files, *quick)
    assert run("--features", str(folder), *quick) == wanted
    other = blobs(90)[0] * 0
    _vissl(folder, other, blobs(90)[1], layer="train_heads")
    _vissl(folder, other[:60], blobs(60)[1], layer="train_heads", split="test")
    with pytest.raises(UserError, match="holds features of several layers: choose one with --layer, of res5, train_h"):
        run("--features", str(folder), *quick)
    assert run("--features", str(folder), "--layer", "res5", *quick) == wanted
    assert not load_features(folder, "train", "train_heads")[0].any()
    with pytest.raises(UserError, match="contains no features of conv1 of the train images, only of res5, train_heads"):
        run("--features", str(folder), "--layer", "conv1", *quick)
    (folder / "rank1_chunk0_test_res5_targets.npy").unlink()
    with pytest.raises(UserError, match=r"there is no file .*rank1_chunk0_test_res5_targets\.npy"):
        run("--features", str(folder), "--layer", "res5", *quick)


@pytest.mark.vissl
def test_vissls_own_loader_reads_what_is_saved(tmp_path):
    from vissl.utils.extract_features_utils import ExtractedFeaturesLoader

    features, labels = (torch.from_numpy(part) for part in blobs(9))
    save_features(tmp_path, "train", "backbone", features, labels)
    loaded = ExtractedFeaturesLoader.load_features(str(tmp_path), "train", "backbone")
    assert np.array_equal(loaded["features"], features) and np.array_equal(loaded["targets"][:, 0], labels)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Dark and light images, and the weights of a small model of the published format."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, level in (("dark", 20), ("light", 180)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (level + rng.integers(0, 60, (40, 50, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    torch.manual_seed(0)
    model = expand_resnet_dim(torchvision.models.resnet18(), 1024, bottleneck=16)
    model(torch.randn(4, 3, 32, 32))
    state = {key.replace("avgpool.0.", "resizer."): value for key, value in model.state_dict().items()}
    torch.save(state, root / "file.torch")
    return root


def _of_images(root: Path) -> list[str]:
    folders = ["--train-dir", str(root / "train"), "--val-dir", str(root / "val")]
    return ["--weights", str(root / "file.torch"), *folders, "--num-workers", "0", "--batch-size", "3"]


@pytest.mark.slow
def test_images_by_a_file_of_weights(images, tmp_path):
    config = tmp_path / "svc.yaml"
    config.write_text("probes: [{kind: svc, C: 1}, {kind: logistic, C: [1, 10]}]\nholdout: 0.25\n")
    saved, common = tmp_path / "saved", ["--config", str(config), "--device", "cpu"]
    found = run(*_of_images(images), "--save", str(saved), *common)
    assert [(row["kind"], row["dim"], row["labels"]) for row in found] == [("svc", 1024, 16), ("logistic", 1024, 16)]
    assert [row["acc1"] for row in found] == [100, 100]
    features, labels = load_features(saved, "train")
    assert labels.tolist() == [0] * 8 + [1] * 8
    with Image.open(images / "train" / "light" / "2.png") as image, torch.no_grad():
        wanted = load_dissl(images / "file.torch")(preprocessor()(image)[None])[0]
    torch.testing.assert_close(features[10], wanted, atol=1e-4, rtol=1e-4)
    assert run("--features", str(saved), *common) == found
    with pytest.raises(
        UserError, match=r"--save .* is not empty; give another folder, or --features .*saved to evaluate it"
    ):
        run(*_of_images(images), "--save", str(saved), *common)


def test_wrong_images_are_named(images, tmp_path, quick):
    base = ["--weights", str(images / "file.torch"), "--num-workers", "0", *quick]
    folder = str(images / "train")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "dark").mkdir(parents=True)
    (tmp_path / "other" / "dark" / "0.png").write_text("no image")
    for val, message in {
        "nowhere": "there is no folder .*nowhere",
        "empty": "empty must hold a folder of images for each class",
        "other": "have different class folders: only one of them has light",
    }.items():
        with pytest.raises(UserError, match=message):
            run(*base, "--train-dir", folder, "--val-dir", str(tmp_path / val))
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image"):
        run(*base, "--train-dir", str(tmp_path / "other"), "--val-dir", str(tmp_path / "other"))
    with pytest.raises(UserError, match="there is no file nothing, and no published weights of that name"):
        run("--weights", "nothing", "--train-dir", folder, "--val-dir", folder, *quick)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --train, --features, --weights, got none; see --help"),
        (["--features", "a", "--weights", "b"], "got --features and --weights"),
        (["--train", "a", "b"], "--train needs --test"),
        (["--weights", "a", "--train-dir", "b"], "--weights needs --val-dir"),
        (["--features", "a", "--save", "b"], "--save goes with --weights, not with --features"),
        (["--train", "a", "b", "--test", "a", "b", "--layer", "c"], "--layer goes with --features, not with --train"),
        (["--features", "nowhere"], "there is no folder nowhere"),
        (
            ["--features", "a", "--config", "nothing"],
            "--config must be a YAML file or the name of one in configs/probes, got nothing",
        ),
        (["--features", "a", "--device", "nothing"], "--device nothing cannot be used"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        run(*options)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (
            np.zeros(3, np.float32),
            np.zeros(3, int),
            r"x.npy must be floating-point numbers \[N, D\], got float32 \[3\]",
        ),
        (np.zeros((3, 2), int), np.zeros(3, int), r"must be floating-point numbers \[N, D\], got int64 \[3, 2\]"),
        (np.full((3, 2), np.nan), np.zeros(3, int), "x.npy hold numbers that are not finite"),
        (np.zeros((3, 2)), np.zeros(4, int), r"y.npy must be 3 integers, one .*, got int64 \[4\]"),
        (np.zeros((3, 2)), np.zeros(3), r"y.npy must be 3 integers, one .*, got float64 \[3\]"),
        (np.zeros((3, 2)), np.array([0, -1, 1]), "y.npy must be classes of at least 0, got -1"),
        (np.array([object()]), np.zeros(3, int), "x.npy is not a readable .npy file: Object arrays cannot be"),
    ],
)
def test_wrong_files_are_named(features, labels, message, tmp_path):
    np.save(tmp_path / "x.npy", features)
    np.save(tmp_path / "y.npy", labels)
    with pytest.raises(UserError, match=message):
        load_arrays(tmp_path / "x.npy", tmp_path / "y.npy")


def test_sides_of_unequal_width_and_too_few_labels(files, quick, tmp_path):
    np.save(tmp_path / "test_x.npy", blobs(60, dim=4)[0])
    with pytest.raises(UserError, match="the training features have 5 dimensions, the test features 4"):
        run(*files, *quick)
    np.save(tmp_path / "test_x.npy", blobs(60)[0])
    np.save(tmp_path / "train_y.npy", np.arange(90))
    with pytest.raises(UserError, match=r"quick.yaml: cannot split 90 labels into 81 and 9 "):
        run(*files, *quick)


@pytest.mark.slow
def test_command_needs_no_framework_and_ends_in_one_sentence(files, quick, tmp_path):
    block = (
        "import sys\n"
        "for name in ('solo', 'solo_ext', 'lightly', 'lightly_ext', 'vissl', 'vissl_ext', 'pytorch_lightning'):\n"
        "    sys.modules[name] = None\n"
        "from plugins.tools.linear_eval import main\n"
        "then = sys.argv.index('then')\n"
        "main(sys.argv[1:then])\n"
        "print('then')\n"
        "main(sys.argv[then + 1:])\n"
    )
    arguments = [*files, *quick, "then", *files, "--config", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", block, *arguments], capture_output=True, text=True)
    first, second = done.stdout.split("then\n")
    assert "linear probe, 90 labels: top-1" in first
    assert (done.returncode, second, done.stderr) == (
        2,
        "",
        f"error: --config must be a YAML file or the name of one in configs/probes, got {tmp_path}\n",
    )
