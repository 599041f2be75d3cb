"""Self-Supervised-Vision: its metric during training, its checkpoints, and the tasks that evaluate a network."""

import csv
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from plugins.testing import tiny_backbone
from plugins.tools.command import UserError
from plugins.tools.knn import knn_accuracy
from plugins.tools.neighbors import neighbor_consistency
from plugins.tools.probe import Probe, Setting, evaluate_probe
from solo_ext import datasets
from solo_ext.checkpoint import find_checkpoint, read_checkpoint
from solo_ext.config import parse_pretrain
from solo_ext.datasets import image_dataset
from solo_ext.features import extractor, read_run
from solo_ext.main_pretrain import pretrain
from solo_ext.registry import method_class
from solo_ext.ssv import evaluate
from solo_ext.ssv.checkpoints import LAYOUTS, load_network
from solo_ext.ssv.command import Arguments, run
from solo_ext.ssv.metrics import K, NeighborMetrics, outputs
from solo_ext.ssv.repairs import announcements
from solo_ext.transforms import evaluation_transform

pytestmark = pytest.mark.solo

ROOT = Path(__file__).parents[2]

# the metric during training


def _column(folder: Path, name: str) -> dict[int, float]:
    """Return epoch, from 1 → number in a column of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["epoch"]) + 1: float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.mark.slow
def test_the_metric_is_logged_and_changes_nothing(compose, tiny, tmp_path, capsys):
    """Three epochs, evaluated after the second and the last, and the same run without."""
    overrides = (tiny, "++max_epochs=3", "++checkpoint.version=v", "++method_kwargs.predictor=none")
    plain = pretrain(compose("relic", *overrides, "++checkpoint.group=plain"))
    images = []
    folder = tmp_path / "runs" / "measured" / "v"
    cfg = compose("relic", *overrides, "++checkpoint.group=measured")
    assert pretrain(cfg, lambda folder: [NeighborMetrics(folder, every=2), _Keep(images)]) == folder
    weights = [read_checkpoint(find_checkpoint(run))["state_dict"] for run in (plain, folder)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    shares = {part: _column(folder, f"val_neighbors_{part}") for part in ("head", "trunk")}
    assert [list(each) for each in shares.values()] == [[2, 3], [2, 3]]
    losses = _column(folder, "train_ssl_loss_epoch")
    lines = [f"[TRAIN] Epoch    {epoch}/   3 [loss] {loss:.4f}" for epoch, loss in losses.items()]
    valid = [f"[VALID] Epoch    {epoch}/   3 [accuracy] {share / 100:.4f}" for epoch, share in shares["head"].items()]
    assert (folder / "trainlogs.txt").read_text().splitlines() == [*lines[:2], valid[0], lines[2], valid[1]]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[VALID]")] == valid

    # the weights of the last epoch, on the same images
    features = extractor(read_run(folder), torch.device("cpu"), projector=True)
    with torch.no_grad():
        batches = [(features(batch), labels) for batch, labels in images[0]]
    labels = torch.cat([labels for _, labels in batches])
    for part, kind in (("head", "projector"), ("trunk", "backbone")):
        rows = torch.cat([batch[kind] for batch, _ in batches])
        assert shares[part][3] == pytest.approx(100 * neighbor_consistency(rows, labels, K)), part


class _Keep(NeighborMetrics):
    """A callback that does no more than to keep the validation batches."""

    def __init__(self, kept: list) -> None:
        self.kept = kept

    def on_fit_start(self, trainer, module) -> None:
        self.kept.append(trainer.datamodule.val_dataloader())

    def on_train_start(self, trainer, module) -> None:
        pass

    def on_train_epoch_end(self, trainer, module) -> None:
        pass


def test_lines_of_epochs_that_are_trained_again_are_deleted(tmp_path):
    lines = ["[INFO] begun", *(f"[TRAIN] Epoch {e:4d}/  12 [loss] 1.0000" for e in (9, 10, 11))]
    lines.insert(3, "[VALID] Epoch   10/  12 [accuracy] 0.5000")
    (tmp_path / "trainlogs.txt").write_text("\n".join(lines) + "\n")
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=10)
    NeighborMetrics(tmp_path, 2).on_train_start(trainer, None)
    assert (tmp_path / "trainlogs.txt").read_text().splitlines() == lines[:4]


def test_too_few_test_images_are_refused_before_the_training(compose, tiny, digits, tmp_path):
    few = tmp_path / "few"
    for folder in (digits / "val").iterdir():
        (few / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:2]:
            (few / folder.name / image.name).symlink_to(image)
    cfg = compose("relic", tiny, f"data.val_path={few}")
    with pytest.raises(UserError, match="more than 20 labelled test images, got 20"):
        pretrain(cfg, lambda folder: [NeighborMetrics(folder, every=1)])
    assert not list(tmp_path.rglob("*.ckpt"))


# checkpoints of the original, from networks of our own with its layers, names and files


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _two(width: int, out: int, *, last: bool) -> nn.Module:
    layers = {"fc1": nn.Linear(width, width), "bn1": nn.BatchNorm1d(width), "relu": nn.ReLU()}
    layers["fc2"] = nn.Linear(width, out)
    return _named(**layers, **({"bn2": nn.BatchNorm1d(out)} if last else {}))


def _norm(width: int, out: int, between: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    return [nn.Linear(width, out), nn.BatchNorm1d(out), between()]


WIDTH, OUT = 32, 16
"""Widths of the features of the tiny backbone, and of the heads."""


def _original(algo: str) -> tuple[nn.Module, dict[str, nn.Module] | None, list[str]]:
    """Return a network in the original's structure, the modules of its file (None: one flat file), and what it sees."""
    trunk = tiny_backbone()
    if algo in ("byol", "relic"):
        whole = _named(encoder=trunk, proj_head=_two(WIDTH, OUT, last=False), pred_head=_two(OUT, OUT, last=False))
        return whole, {"encoder": whole}, ["encoder", "proj_head", "pred_head"]
    if algo == "simsiam":
        head = [*_norm(WIDTH, OUT), *_norm(OUT, OUT), *_norm(OUT, OUT)[:2]]
        whole = _named(encoder=trunk, proj_head=nn.Sequential(*head))
        whole.add_module("pred_head", nn.Sequential(*_norm(OUT, 8), nn.Linear(8, OUT)))
        return whole, {"encoder": whole}, ["encoder", "proj_head", "pred_head"]
    if algo == "moco":
        whole = _named(encoder=trunk, relu=nn.ReLU(), proj_head=nn.Linear(WIDTH, OUT))
        return whole, {"encoder": whole}, ["encoder", "relu", "proj_head"]
    if algo == "swav":
        head = nn.Sequential(*_norm(WIDTH, WIDTH, nn.GELU), *_norm(WIDTH, OUT)[:2])
        whole = _named(encoder=trunk, proj_head=head)
        return whole, {"encoder": whole}, ["encoder", "proj_head"]
    if algo == "dino":
        layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)]
        whole = _named(encoder=trunk, proj_head=nn.Sequential(*layers))
        with pytest.warns(FutureWarning, match="weight_norm"):
            whole.add_module("fc_out", nn.utils.weight_norm(nn.Linear(WIDTH, 6)))
        return whole, {"encoder": whole}, ["encoder", "proj_head", "unit", "fc_out"]
    if algo == "pirl":
        whole = _named(encoder=trunk, f_proj_head=nn.Linear(WIDTH, OUT), g_proj_head_initial=nn.Linear(WIDTH, OUT))
        whole.add_module("g_proj_head_final", nn.Linear(4 * OUT, OUT))
        return whole, {"encoder": whole}, ["encoder", "f_proj_head"]
    if algo == "sela":
        heads = nn.ModuleList([nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)])
        return _named(backbone=trunk, cluster_heads=heads), None, ["backbone"]
    if algo == "deep_cluster":
        whole = _named(encoder=trunk, clf_head=nn.Linear(WIDTH, 6))
        return whole, dict(whole.named_children()), ["encoder"]
    if algo == "barlow":
        layers = {f"layer{i}": nn.Sequential(*_norm(WIDTH, WIDTH)) for i in (1, 2)}
        head = _named(**layers, layer3=nn.Linear(WIDTH, WIDTH))
    else:
        head = _two(WIDTH, OUT, last=True)
    whole = _named(encoder=trunk, proj_head=head)
    return whole, dict(whole.named_children()), ["encoder", "proj_head"]


METHODS = {"barlow": "barlow_twins", "deep_cluster": "deepcluster"}
"""The original's name of a method → ours, if it is another."""
OPTIONS = {
    "byol": ("scale_loss=0.5", f"pred_hidden_dim={OUT}"),
    "relic": (f"pred_hidden_dim={OUT}",),
    "simsiam": ("head=ssv", f"proj_hidden_dim={OUT}", "pred_hidden_dim=8"),
    "moco": ("head=linear",),
    "barlow": ("head=ssv", f"proj_output_dim={WIDTH}"),
    "dino": ("head=ssv", f"proj_hidden_dim={WIDTH}"),
    "pirl": ("head=linear",),
    "sela": (),
}
"""Algorithm → options of our method that make its heads those of the original."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[nn.Module, list[str], Path]]:
    """Algorithm → a network with random weights and statistics, what it sees, and the folder of its best_model.pt."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for algo in LAYOUTS:
        whole, modules, path = _original(algo)
        for value in whole.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + (0.1 if value.ndim == 1 else -0.5))
        folder = tmp_path_factory.mktemp(algo)
        state = whole.state_dict() if modules is None else {k: v.state_dict() for k, v in modules.items()}
        torch.save(state, folder / "best_model.pt")
        found[algo] = whole.eval(), path, folder
    return found


@pytest.fixture
def method(compose, tiny):
    """method(algo) → our method with the heads of the original."""

    def build(algo: str) -> nn.Module:
        name = METHODS.get(algo, algo)
        given = OPTIONS.get(algo, ("head=ssv",))
        cfg = compose(name, tiny, *(f"++method_kwargs.{option}" for option in given))
        cfg = parse_pretrain(cfg)
        return method_class(cfg)(cfg)

    return build


@pytest.mark.parametrize("algo", LAYOUTS)
@torch.no_grad()
def test_a_file_of_the_original_gives_its_outputs(algo, files, method):
    whole, path, folder = files[algo]
    ours = method(algo).eval()
    assert load_network(folder, algo, ours) == folder / "best_model.pt"
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    got, expected = outputs(ours)(images), images
    for name in path:
        expected = F.normalize(expected, dim=1) if name == "unit" else whole.get_submodule(name)(expected)
    if algo not in ("sela", "dino"):
        expected = F.normalize(expected, dim=1)
    torch.testing.assert_close(got["head"], expected)
    torch.testing.assert_close(got["trunk"], whole.get_submodule(path[0])(images))


def _saved(folder: Path, content: object) -> Path:
    folder.mkdir()
    torch.save(content, folder / "best_model.pt")
    return folder


def test_other_files_are_refused_in_one_sentence(files, method, tmp_path):
    ours = method("byol")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    state = files["byol"][0].state_dict()
    tensors = "it contains other things than weights"
    cases = {
        "another algorithm": (files["simsiam"][2], "byol", "21 weights of the projector in the file, 9 here"),
        "its layout": (files["simclr"][2], "byol", "is not a checkpoint of byol: it contains encoder.conv1.weight"),
        "another width": (
            _saved(tmp_path / "a", {"encoder": {**state, "proj_head.fc2.bias": torch.zeros(9)}}),
            "byol",
            r"--algo, --arch and --config: of another shape projector\.3\.bias \(9 in the file, 16 here\)",
        ),
        "one weight is missing": (
            _saved(tmp_path / "b", {"encoder": {k: v for k, v in state.items() if k != "encoder.conv1.weight"}}),
            "byol",
            "missing backbone.conv1.weight",
        ),
        "no original": (files["byol"][2], "cpc", r"the original has no cpc"),
        "numbers": (_saved(tmp_path / "c", {"encoder": {"epoch": 3}}), "byol", tensors),
        "a list": (_saved(tmp_path / "d", [1, 2]), "byol", tensors),
        "code": (_saved(tmp_path / "e", {"encoder": SimpleNamespace()}), "byol", "code that is not safe to load"),
        "empty": (tmp_path, "byol", r"contains neither best_model\.pt nor a checkpoint"),
    }
    (tmp_path / "e" / "x").mkdir()
    (tmp_path / "e" / "x" / "best_model.pt").write_bytes(b"PK no file of torch")
    cases["broken"] = (tmp_path / "e" / "x", "byol", "cannot be read as a checkpoint")
    for name, (folder, algo, sentence) in cases.items():
        with pytest.raises(UserError, match=sentence) as error:
            load_network(folder, algo, ours)
        assert "\n" not in str(error.value), name
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


# the tasks


LINEAR = {"epochs": 20, "batch_size": 32, "lr": 0.1}


@pytest.fixture
def arguments(compose, tiny, tmp_path, monkeypatch):
    """arguments(algo, load=…) → those of a task, with the configuration of the tiny backbone."""

    def build(algo: str, **more) -> Arguments:
        options = (f"++method_kwargs.{option}" for option in OPTIONS[algo])
        cfg = compose(METHODS.get(algo, algo), tiny, *options)
        monkeypatch.setattr(evaluate, "translate", lambda *_, **__: cfg)
        output = str(tmp_path / "out")
        return Arguments({"linear_eval": LINEAR}, algo=algo, arch="resnet18", output=output, **more)

    return build


def test_features_of_a_file_of_the_original_are_written(arguments, files, digits, tmp_path, capsys):
    evaluate.get_features(arguments("sela", load=files["sela"][2]))
    whole, _, folder = files["sela"]
    assert f"loaded {folder / 'best_model.pt'}" in capsys.readouterr().out
    arrays = {path.name: np.load(path, allow_pickle=False) for path in (tmp_path / "out").glob("*.npy")}
    assert {name: (each.shape, each.dtype.name) for name, each in arrays.items()} == {
        "train_fvecs.npy": ((96, WIDTH), "float32"),
        "train_gt.npy": ((96,), "int64"),
        "test_fvecs.npy": ((40, WIDTH), "float32"),
        "test_gt.npy": ((40,), "int64"),
    }
    # rows in the order of the files, as evaluated: whole images, in evaluation mode
    transform = evaluation_transform("digits", 16, {})
    images = image_dataset("digits", digits / "val", "val", transform, indexed=False, no_labels=False)
    for row in (0, 17, 39):
        image, label = images[row]
        with torch.no_grad():
            expected = whole.backbone(image[None])[0].numpy()
        np.testing.assert_allclose(arrays["test_fvecs.npy"][row], expected, rtol=1e-4, atol=1e-5)
        assert arrays["test_gt.npy"][row] == label


@pytest.mark.slow
def test_linear_evaluation_of_our_run(arguments, compose, tiny, tmp_path, capsys, monkeypatch):
    """The numbers are those of the arrays that get_features writes, and those of the training's last evaluation."""
    options = (f"++method_kwargs.{option}" for option in OPTIONS["relic"])
    trained = pretrain(compose("relic", tiny, *options), lambda folder: [NeighborMetrics(folder, every=5)])
    args = arguments("relic", load=trained)
    opened = []

    class Folder(datasets.ImageFolder):
        def __init__(self, path, *more, **options):
            opened.append(Path(path).name)
            super().__init__(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "ImageFolder", Folder)
        result = evaluate.linear_eval(args)
    assert opened == ["train", "val"], "each folder is read once"
    evaluate.get_features(args)
    out = tmp_path / "out"
    assert json.loads((out / "linear_eval.json").read_text()) == result
    for part in ("head", "trunk"):
        assert result["neighbors"][part] == pytest.approx(_column(trained, f"val_neighbors_{part}")[1])
    train, test = (
        [torch.from_numpy(np.load(out / f"{s}_{k}.npy")) for k in ("fvecs", "gt")] for s in ("train", "test")
    )
    torch.testing.assert_close(train[0].norm(dim=1), torch.ones(96))
    assert result["neighbors"]["head"] == pytest.approx(100 * neighbor_consistency(*test))
    assert result["knn"]["head"] == pytest.approx(knn_accuracy(*train, *test, k=20, temperature=0.07)[0])
    setting = Setting(weight_decay=1e-6, lr=0.1, optimizer="sgd")
    probe = Probe(grid=(setting,), epochs=20, batch_size=32)
    assert result["linear"]["head"] == evaluate_probe(train, test, probe)["acc1"]
    lines = (out / "trainlogs.txt").read_text().splitlines()
    assert lines == [f"[INFO] Test linear eval accuracy: {result['linear']['head'] / 100:.4f}"]
    printed = capsys.readouterr().out
    for kind, title in (("knn", "weighted kNN, k 20"), ("linear", "linear classifier")):
        assert f"{title}: head {result[kind]['head']:.2f} %  trunk {result[kind]['trunk']:.2f} %" in printed


def test_tasks_refuse_before_they_read_an_image(arguments, files, tmp_path):
    for task in (evaluate.get_features, evaluate.linear_eval):
        with pytest.raises(UserError, match="with --load"):
            task(arguments("relic"))
        with pytest.raises(UserError, match="contains another network"):
            task(arguments("relic", load=files["simsiam"][2]))
        with pytest.raises(UserError, match=f"there is no checkpoint {tmp_path / 'nowhere'}"):
            task(arguments("relic", load=tmp_path / "nowhere"))
    bad = arguments("relic", load=files["relic"][2])
    bad.document["linear_eval"] = {**LINEAR, "lr": 0}
    with pytest.raises(UserError, match="linear_eval: lr must be above 0, got 0"):
        evaluate.linear_eval(bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_train_on_two_devices_then_linear_eval_then_get_features(thin_digits, tmp_path, monkeypatch, capsys):
    """The three tasks of main.py: an epoch of BYOL's trial in two processes, whose numbers are those of one process.

    41 test images and 99 training images: the processes have shares of different sizes.
    """
    monkeypatch.chdir(tmp_path)
    given = ["-c", str(ROOT / "configs" / "ssv" / "digits" / "byol.yaml"), "-a", "byol", "-m", "resnet18"]
    entries = [f"data.root={thin_digits(99, 41)}", "data.batch_size=32", "epochs=1", "eval_every=1"]
    entries += ["linear_eval.epochs=2", "scheduler.warmup_epochs=0", "data.num_workers=0"]
    words = [sys.executable, str(ROOT / "main.py"), *given, "-t", "train", "-o", "trained", "--devices", "2", *entries]
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "outputs" / "byol" / "resnet18" / "trained"
    assert OmegaConf.load(folder / "args.json").devices == 2
    # 99 images: 50 in each process, in batches of 16
    assert read_checkpoint(find_checkpoint(folder))["global_step"] == 4
    logged = (folder / "trainlogs.txt").read_text().splitlines()
    assert [line.partition(" [")[0] for line in logged] == [
        *(f"[{kind}] Epoch    1/   1" for kind in ("TRAIN", "VALID")),
        f"[INFO] Test linear eval accuracy:{logged[-1].rpartition(':')[2]}",
    ]
    printed = done.stdout.splitlines()
    assert [printed.count(line) for line in (announcements("byol")[0], logged[1])] == [1, 1]

    run([*given, "-t", "linear_eval", "-l", str(folder), "-o", "evaluated", *entries])
    results = [json.loads((at / "linear_eval.json").read_text()) for at in (folder, folder.parent / "evaluated")]
    for kind in ("neighbors", "knn", "linear"):
        assert results[0][kind] == results[1][kind], kind
    for part in ("head", "trunk"):
        share = results[1]["neighbors"][part]
        assert share * 41 * K / 100 == pytest.approx(round(share * 41 * K / 100), abs=1e-6)  # of 41 images, each once
        assert _column(folder, f"val_neighbors_{part}")[1] == pytest.approx(share, rel=1e-6)
    assert f"[accuracy] {results[0]['neighbors']['head'] / 100:.4f}" in logged[1]
    run([*given, "-t", "get_features", "-l", str(folder), "-o", "features", *entries])
    shapes = {path.name: np.load(path).shape for path in (folder.parent / "features").glob("*.npy")}
    assert shapes == {
        **{"train_fvecs.npy": (99, 128), "train_gt.npy": (99,)},
        **{"test_fvecs.npy": (41, 128), "test_gt.npy": (41,)},
    }
    loaded = [line for line in (done.stdout + capsys.readouterr().out).splitlines() if line.startswith("loaded ")]
    assert [Path(line.removeprefix("loaded ")).resolve() for line in loaded] == [find_checkpoint(folder)] * 3
