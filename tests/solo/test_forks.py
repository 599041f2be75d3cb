"""Configurations as the forks have them: the keys and structure of their YAML files, their meaning, the logged names.

implicit-var-reg trains ``method: directpred`` and ``method: byol``, the branch ssley ``method: ssley``. The YAML here
is ours, in their form. With FORKS_CHECKOUTS naming a folder that holds their checkouts as implicit-var-reg/ and
solo-learn-ssley/, their 24 files are read too.
"""

import csv
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from plugins.methods import METHODS
from plugins.predictors import ClosedFormPredictor
from plugins.testing import tiny_backbone
from solo_ext import main_knn, main_linear, main_pretrain
from solo_ext.architectures import ARCHITECTURES
from solo_ext.checkpoint import find_checkpoint
from solo_ext.config import parse_linear, parse_pretrain
from solo_ext.registry import method_class, plugin_methods

pytestmark = pytest.mark.solo

CHECKOUTS = "FORKS_CHECKOUTS"
ROOT = Path(__file__).parents[2]

# The entries above and below the method in all files of both forks.
_HEAD = """
defaults:
  - _self_
  - augmentations: {views}.yaml
  - wandb: private.yaml
  - override hydra/hydra_logging: disabled
  - override hydra/job_logging: disabled

hydra:
  output_subdir: null
  run:
    dir: .

name: "{name}-digits"
backbone:
  name: "resnet18"
data:
  dataset: digits
  train_path: "./datasets"
  val_path: "./datasets"
  format: "image_folder"
  num_workers: 0
scheduler:
  name: "warmup_cosine"
checkpoint:
  enabled: True
  dir: "trained_models"
  frequency: 1
auto_resume:
  enabled: True
max_epochs: 2
sync_batchnorm: True
accelerator: "gpu"
strategy: "ddp"
"""
_LARS = """
optimizer:
  name: "lars"
  batch_size: 16
  lr: 0.45
  classifier_lr: 0.2
  weight_decay: 1e-5
  kwargs:
    clip_lr: True
    eta: 0.02
    exclude_bias_n_norm: True
"""
_SGD = """
optimizer:
  name: "sgd"
  batch_size: 16
  lr: 0.1
  classifier_lr: 0.1
  weight_decay: 1e-5
  kwargs:
    momentum: 0.9
"""
_DIRECT = """
method: "directpred"
method_kwargs:
  proj_hidden_dim: 32
  proj_output_dim: 16
  dp_alpha: 0.5
  dp_normalize: True
  iso: {iso}
  dp_tau: {tau}
  eps_iso: 0.0
  log_eigvals: True
  use_l2: False
"""
_BYOL = """
method: "byol"
method_kwargs:
  proj_hidden_dim: 32
  proj_output_dim: 16
  pred_hidden_dim: 32
  log_eigvals: True
  use_l2: False
"""
_SSLEY = """
method: "ssley"
method_kwargs:
  proj_hidden_dim: 32
  proj_output_dim: 16
"""
_EMA = "momentum:\n  base_tau: 0.99\n  final_tau: 1.0\n"
_NO_EMA = "momentum:\n  base_tau: 0.0\n  final_tau: 0.0\n"
_ONE = "devices: [0]\nprecision: 16\n"
_MIXED = "devices: [0]\nprecision: 16-mixed\n"
_FOUR = "devices: [0, 1, 2, 3]\nprecision: 16\naccumulate_grad_batches: 16\n"

_FILES = {
    "directpred": ("asymmetric", _DIRECT.format(iso=False, tau=0.998), _EMA, _LARS, _ONE),
    "directpred-noema": ("asymmetric", _DIRECT.format(iso=False, tau=0.5), _NO_EMA, _SGD, _ONE),
    "isoloss": ("asymmetric", _DIRECT.format(iso=True, tau=0.998), _EMA, _LARS, _ONE),
    "isoloss-noema": ("asymmetric", _DIRECT.format(iso=True, tau=0.5), _NO_EMA, _SGD, _ONE),
    "isoloss-four": ("asymmetric", _DIRECT.format(iso=True, tau=0.998), _EMA, _LARS, _FOUR),
    "byol": ("asymmetric", _BYOL, _EMA, _LARS, _ONE),
    "byol-noema": ("asymmetric", _BYOL, _NO_EMA, _SGD, _ONE),
    "ssley": ("symmetric", _SSLEY, "", _LARS, _MIXED),
}


def _view(crops: int, solarization: float, *, flags: bool) -> dict:
    """One entry of ``augmentations``; with the ``enabled`` entries that only some files have."""
    parts = {
        "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        "grayscale": {"prob": 0.2},
        "gaussian_blur": {"prob": 0.0},
        "solarization": {"prob": solarization},
        "equalization": {"prob": 0.0},
        "horizontal_flip": {"prob": 0.5},
    }
    if flags:
        parts = {name: {"enabled": part["prob"] > 0, **part} for name, part in parts.items()}
    crop = {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0}
    return {"rrc": crop, **parts, "crop_size": 16, "num_crops": crops}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """A folder in the form of the forks' scripts/pretrain/<dataset>."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "augmentations").mkdir()
    (folder / "wandb").mkdir()
    views = {
        "asymmetric": [_view(1, 0.0, flags=False), _view(1, 0.2, flags=False)],
        "symmetric": [_view(2, 0.1, flags=True)],
    }
    for name, entries in views.items():
        OmegaConf.save(OmegaConf.create(entries), folder / "augmentations" / f"{name}.yaml")
    (folder / "wandb" / "private.yaml").write_text('enabled: True\nentity: None\nproject: "solo-learn"\n')
    for name, (augmentations, *parts) in _FILES.items():
        (folder / f"{name}.yaml").write_text(_HEAD.format(views=augmentations, name=name) + "".join(parts))
    return folder


def _forced(digits: Path) -> list[str]:
    """Return the overrides that a machine without a GPU and without the forks' data needs."""
    return ["accelerator=cpu", f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"]


@pytest.fixture
def composed(scripts, digits):
    """composed(name, *overrides) → a configuration of these files."""

    def build(name: str, *overrides: str):
        with initialize_config_dir(str(scripts), version_base="1.2"):
            return compose(name, [*_forced(digits), *overrides])

    return build


@pytest.fixture
def train(scripts, digits, tmp_path, monkeypatch):
    """train(name, *overrides) → the folder of a run of the command, two batches an epoch, each of them logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(name: str, *overrides: str) -> Path:
        few = ["++limit_train_batches=2", "++limit_val_batches=1", "++log_every_n_steps=1"]
        version = "++checkpoint.version=v"
        argv = ["--config-path", str(scripts), "--config-name", f"{name}.yaml", *_forced(digits), *few, version]
        monkeypatch.setattr(sys, "argv", ["prog", *argv, *overrides])
        main_pretrain.main()
        (folder,) = (tmp_path / "trained_models").glob("*/v")
        return folder

    return run


def _rows(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _logged(folder: Path) -> dict[str, list[float]]:
    """Every logged name with its values in order."""
    rows = _rows(folder)
    return {name: [float(row[name]) for row in rows if row[name] != ""] for name in rows[0]}


# what the keys mean


_NUMBERS = ("alpha", "eps", "rho", "normalize", "iso", "metric", "proj_hidden_dim", "proj_output_dim", "mode", "center")
_COPY = ("method_kwargs.dp_alpha=1", "method_kwargs.eps_iso=0.25")
_MEANINGS = [
    ("directpred", (), "directpred", {}),
    ("directpred", _COPY, "directcopy", {}),
    ("isoloss", (), "isoloss", {}),
    ("isoloss", _COPY, "isocopy", {}),
    ("isoloss-noema", (), "isoloss", {"rho": 0.5}),
    ("isoloss", ("method_kwargs.use_l2=True", "method_kwargs.dp_normalize=False"), "isoloss",
     {"metric": "euclidean", "normalize": False}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.sample("isoloss-noema-*")
@pytest.mark.parametrize(("name", "overrides", "ours", "given"), _MEANINGS)
def test_directpreds_options_are_those_of_our_methods(name, overrides, ours, given, composed):
    cfg = parse_pretrain(composed(name, *overrides))
    model = method_class(cfg)(cfg)
    assert type(model) is plugin_methods()["directpred"]
    wanted = METHODS[ours].resolve({"proj_hidden_dim": 32, "proj_output_dim": 16, **given})
    assert {key: model.options[key] for key in _NUMBERS} == {key: wanted[key] for key in _NUMBERS}
    assert (
        METHODS[ours].loss is METHODS["directpred"].loss and METHODS[ours].predictor is METHODS["directpred"].predictor
    )
    predictor = model.predictor
    assert isinstance(predictor, ClosedFormPredictor) and model.log_eigvals
    assert (predictor.alpha, predictor.eps, predictor.rho, predictor.normalize) == tuple(
        wanted[key] for key in ("alpha", "eps", "rho", "normalize")
    )
    assert model.has_teacher is ("noema" not in name)


@pytest.mark.slow
def test_byol_with_their_options_is_ours(composed):
    for name, metric in (("byol", "cosine"), ("byol-noema", "euclidean")):
        cfg = parse_pretrain(composed(name, f"method_kwargs.use_l2={metric == 'euclidean'}"))
        model = method_class(cfg)(cfg)
        assert type(model) is plugin_methods()["byol"]
        assert model.options["metric"] == metric and model.log_eigvals and model.options["pred_hidden_dim"] == 32
        assert model.moment.rho == 0.99  # theirs, for the log alone
        assert model.has_teacher is (name == "byol")


def test_ssley_is_ssl_ey(composed):
    cfg = parse_pretrain(composed("ssley"))
    model = method_class(cfg)(cfg)
    assert type(model) is plugin_methods()["ssl_ey"]
    widths = [layer.weight.shape for layer in model.projector if isinstance(layer, torch.nn.Linear)]
    assert widths == [(32, 512), (32, 32), (16, 32)]
    assert cfg.data.num_large_crops == 2 and cfg.data.num_small_crops == 0


def test_learning_rates_grow_with_batch_devices_and_accumulation(composed):
    """solo-learn's rule: times batch x devices / 256, and all rates of the schedule times the accumulated batches."""
    cfg = parse_pretrain(composed("isoloss-four", "optimizer.batch_size=64"))
    assert cfg.devices == 4 and cfg.precision == 32 and cfg.accumulate_grad_batches == 16
    model = method_class(cfg)(cfg)
    wanted = {"lr": 0.45 * 16, "classifier_lr": 0.2 * 16, "warmup_start_lr": 3e-5 * 16, "min_lr": 0.0}
    assert {key: getattr(model, key) for key in wanted} == pytest.approx(wanted)
    assert model.weight_decay == 1e-5
    assert dict(cfg.optimizer.kwargs) == {"clip_lr": True, "eta": 0.02, "exclude_bias_n_norm": True, "momentum": 0.9}


def test_a_machine_without_gpu_or_data_is_told_so_in_one_sentence(scripts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    missing = "error: data.train_path is not a folder: ./datasets"
    cases = [((), missing)]
    if not torch.cuda.is_available():
        (tmp_path / "here" / "0").mkdir(parents=True)
        here = ("data.train_path=here", "data.val_path=here")
        cases.append((here, "error: accelerator is gpu, but this machine has no GPU"))
    for overrides, sentence in cases:
        argv = ["prog", "--config-path", str(scripts), "--config-name", "isoloss", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            main_pretrain.main()
        out, err = capfd.readouterr()
        assert stopped.value.code == 2 and "Traceback" not in err + out
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert line.startswith(sentence)


# the forty commands of run_experiments.sh

_VARIANTS = {
    **{"byol": "byol", "simsiam": "byol-noema", "directcopy": "directpred", "directcopy-noema": "directpred-noema"},
    **{"directcopy-isocopy": "isoloss", "directcopy-isocopy-noema": "isoloss-noema"},
    **{name: name for name in ("directpred", "directpred-noema", "isoloss", "isoloss-noema")},
}
"""Run → its YAML file."""
_DATA = {"cifar10": ("cifar", 10), "cifar100": ("cifar", 100), "stl10": ("stl-10", 10)}
_DATA["tinyimagenet"] = ("tinyimagenet", 200)
"""Data set → its folder of YAML files, its classes."""


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _cifar(folder: Path, patch: pytest.MonkeyPatch, images: np.random.Generator) -> None:
    """CIFAR-10 and CIFAR-100 as their authors pack them, with 4 images a file; torchvision expects these files."""
    for cls in (CIFAR10, CIFAR100):
        names = [name for name, _ in (*cls.train_list, *cls.test_list)]
        (folder / cls.base_folder).mkdir()
        labels, classes = ("labels", 10) if cls is CIFAR10 else ("fine_labels", 100)
        for name in names:
            rows = images.integers(256, size=(16 if name == "train" else 4, 3 * 32 * 32), dtype=np.uint8)
            batch = {"data": rows, labels: images.integers(classes, size=len(rows)).tolist()}
            (folder / cls.base_folder / name).write_bytes(pickle.dumps(batch))
        meta = folder / cls.base_folder / cls.meta["filename"]
        meta.write_bytes(pickle.dumps({cls.meta["key"]: [str(label) for label in range(classes)]}))
        for attribute in ("train_list", "test_list"):
            files = [(name, _md5(meta.parent / name)) for name, _ in getattr(cls, attribute)]
            patch.setattr(cls, attribute, files)
        patch.setattr(cls, "meta", {**cls.meta, "md5": _md5(meta)})


def _stl10(folder: Path, patch: pytest.MonkeyPatch, images: np.random.Generator) -> None:
    """STL-10 as its authors pack it: 8 labelled and 8 unlabelled training images, 8 test images."""
    root = folder / STL10.base_folder
    root.mkdir()
    for split in ("train", "unlabeled", "test"):
        images.integers(256, size=(8, 3, 96, 96), dtype=np.uint8).tofile(root / f"{split}_X.bin")
        if split != "unlabeled":
            images.integers(1, 11, size=8, dtype=np.uint8).tofile(root / f"{split}_y.bin")
    (root / STL10.class_names_file).write_text("\n".join(map(str, range(10))))
    for attribute in ("train_list", "test_list"):
        patch.setattr(STL10, attribute, [[name, _md5(root / name)] for name, _ in getattr(STL10, attribute)])


def _tinyimagenet(folder: Path, images: np.random.Generator) -> None:
    """Tiny ImageNet as ``python -m plugins.tools.data tinyimagenet`` sorts it: two of its classes."""
    for split, count in (("train", 8), ("val", 4)):
        for name in ("n01443537", "n01629819"):
            place = folder / "tinyimagenet" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = images.integers(256, size=(64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{name}_{index}.JPEG")


@pytest.fixture(scope="module")
def fork(scripts, tmp_path_factory) -> Iterator[Path]:
    """A folder like a checkout of implicit-var-reg: its scripts, and in ``datasets`` a few images of each data set.

    With FORKS_CHECKOUTS, ``scripts`` is that of the checkout.
    """
    folder, images = tmp_path_factory.mktemp("implicit-var-reg"), np.random.default_rng(0)
    if root := os.environ.get(CHECKOUTS):
        (folder / "scripts").symlink_to(Path(root, "implicit-var-reg", "scripts").absolute())
    else:
        for name in ("cifar", "stl-10", "tinyimagenet"):
            shutil.copytree(scripts, folder / "scripts" / "pretrain" / name)
        for path in (folder / "scripts" / "pretrain" / "tinyimagenet").glob("*.yaml"):
            text = path.read_text()
            for split in ("train", "val"):
                old, new = (f'{split}_path: "./datasets{end}"' for end in ("", f"/tinyimagenet/{split}"))
                assert old in text
                text = text.replace(old, new)
            path.write_text(text)
    (folder / "datasets").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        _cifar(folder / "datasets", patch, images)
        _stl10(folder / "datasets", patch, images)
        _tinyimagenet(folder / "datasets", images)
        patch.setitem(ARCHITECTURES, "tiny", tiny_backbone)
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("dataset", _DATA)
@pytest.mark.parametrize("name", _VARIANTS)
def test_the_forty_commands_of_run_experiments_train(name, dataset, fork, monkeypatch):
    """Each command, as docs/migration.md has it, with the data that its file names; only the network is small."""
    page = (ROOT / "docs" / "migration.md").read_text()
    (row,) = (line for line in page.splitlines() if f"data.dataset=DATA name={name}_DATA" in line)
    words = row.split("`")[1].replace("DATA", dataset).split()
    assert words[0] == f"{_VARIANTS[name]}.yaml"
    (scripts, classes), run = _DATA[dataset], f"{name}_{dataset}"
    small = ["backbone.name=tiny", "max_epochs=1", "optimizer.batch_size=8", "data.num_workers=0", "accelerator=cpu"]
    small += ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16", "++limit_val_batches=1"]
    small += ["method_kwargs.pred_hidden_dim=32"] if name in ("byol", "simsiam") else []
    small += ["wandb.enabled=False", f"++checkpoint.version={run}", "++log_every_n_steps=1"]
    monkeypatch.chdir(fork)
    given = ["--config-path", f"scripts/pretrain/{scripts}/", "--config-name", *words]
    monkeypatch.setattr(sys, "argv", ["prog", *given, *small])
    main_pretrain.main()
    (folder,) = (fork / "trained_models").glob(f"*/{run}")
    assert folder.parent.name == ("directpred" if "direct" in name or "iso" in name else "byol")
    options = json.loads((folder / "args.json").read_text())
    assert (options["name"], options["data"]["dataset"]) == (run, dataset)
    assert options["optimizer"]["weight_decay"] == (1e-5 if name in ("byol", "simsiam") else 1e-4)
    kwargs = options["method_kwargs"]
    powers = (1, 0.25) if name.startswith("directcopy") else (0.5, 0.0)
    if folder.parent.name == "directpred":
        assert (kwargs["dp_alpha"], kwargs["eps_iso"], kwargs["iso"]) == (*powers, "iso" in name)
    losses = _logged(folder)["train_neg_cos_sim_step"]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    state = torch.load(find_checkpoint(folder), weights_only=True)["state_dict"]
    assert state["classifier.weight"].shape == (classes, 32)


# what is logged


_BOTH = ("train_class_loss", "train_acc1", "train_acc5", "train_z_std")
_EIGEN = tuple(
    f"eigval_metrics/{name}" for name in (*(f"eigval_{s}" for s in ("min", "max", "mean", "std")), "part_ratio")
)
_ONCE = {"val_loss", "val_acc1", "val_acc5"}


def _names(*stepwise: str) -> set[str]:
    return {f"{name}_{when}" for name in stepwise for when in ("step", "epoch")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), [
    ("isoloss", ()),
    ("byol", ("++momentum.classifier=True", "method_kwargs.use_l2=True")),
])  # fmt: skip
def test_their_files_log_their_names_and_resume(name, overrides, train, tmp_path):
    overrides = (*overrides, "wandb.enabled=False", "++checkpoint.keep_prev=True")
    folder = train(name, *overrides)
    logged = _logged(folder)
    assert {"tau", "lr-LARS/backbone", *_ONCE, *_names("train_neg_cos_sim", *_BOTH, *_EIGEN)} <= logged.keys()
    if "++momentum.classifier=True" in overrides:
        teacher = _names("train_momentum_class_loss", "train_momentum_acc1", "train_momentum_acc5")
        assert {*teacher, "momentum_val_loss", "momentum_val_acc1", "momentum_val_acc5"} <= logged.keys()
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert (
        logged["train_neg_cos_sim_step"] == logged["train_ssl_loss_step"] and len(logged["train_neg_cos_sim_step"]) == 4
    )
    assert all(-1 <= value <= 1 for value in logged["train_cosine_step"])
    assert logged["tau"][0] == pytest.approx(0.99, abs=1e-3) and logged["tau"] == sorted(logged["tau"])

    rows = _rows(folder, "eigenvalues.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert list(rows[0]) == ["epoch", *(f"eigval_{index}" for index in range(1, 17))]
    for epoch, row in enumerate(rows):
        s = torch.tensor([float(row[f"eigval_{index}"]) for index in range(1, 17)], dtype=torch.float64)
        wanted = [s.min(), s.max(), s.mean(), s.std(), s.sum() ** 2 / s.square().sum()]
        # the last step of the epoch
        found = [logged[f"{metric}_step"][2 * epoch + 1] for metric in _EIGEN]
        assert found == pytest.approx([float(value) for value in wanted], rel=1e-3, abs=1e-6)
    for metric in _EIGEN:
        first, second = logged[f"{metric}_step"][:2]
        assert logged[f"{metric}_epoch"][0] == pytest.approx((first + second) / 2, rel=1e-4, abs=1e-7)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("eigenvalues")] == [0, 1]

    # killed in the second epoch, and started again with the same command
    before = {path: path.read_text() for path in (folder / "eigenvalues.csv", folder / "metrics.csv")}
    state = torch.load(find_checkpoint(folder), weights_only=True)["state_dict"]
    for path in folder.glob("*.ckpt"):
        if not path.name.endswith("ep=0.ckpt"):
            path.unlink()
    assert train(name, *overrides) == folder
    assert (folder / "eigenvalues.csv").read_text() == before[folder / "eigenvalues.csv"]
    assert _logged(folder)["train_neg_cos_sim_epoch"] == logged["train_neg_cos_sim_epoch"]
    again = torch.load(find_checkpoint(folder), weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in state.items())


@pytest.mark.slow
def test_wandb_without_an_account_logs_offline(train, tmp_path, monkeypatch, capfd):
    """Their files enable wandb: a run without account or network continues, and stores its log for a later upload."""
    import wandb

    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        folder = train("isoloss-noema")
        wandb.finish()
        wandb.teardown()  # until the log is on the disk
    assert capfd.readouterr().out.count("it logs offline to ./wandb") == 1
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (table,) = (run / "files" / "media" / "table").glob("eigvals*.json")
    table = json.loads(table.read_text())
    spectra = [list(row.values()) for row in _rows(folder, "eigenvalues.csv")]
    assert table["columns"] == [f"eigval_{index}" for index in range(1, 17)]
    assert table["data"] == [[float(value) for value in spectrum[1:]] for spectrum in spectra] and len(spectra) == 2
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    for name in (*_names("train_neg_cos_sim", *_BOTH, *_EIGEN), *_ONCE, "tau", "eigenvalues"):
        assert name.encode() in content, name
    assert "WANDB_MODE" not in os.environ
    assert set(_logged(folder)["tau"]) == {0.0}


@pytest.mark.slow
def test_ssleys_file_logs_its_name(train):
    folder = train("ssley", "wandb.enabled=False", "max_epochs=1")
    assert folder.parent.name == "ssley"
    logged = _logged(folder)
    assert {*_names("train_ssley_loss", "train_class_loss", "train_acc1", "train_acc5"), *_ONCE} <= logged.keys()
    assert (
        logged["train_ssley_loss_step"] == logged["train_ssl_loss_step"] and len(logged["train_ssley_loss_step"]) == 2
    )


# evaluations of the branch ssley; tests/solo/test_umap.py has umap.sh


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssley", "barlow"])
def test_linear_evaluation_of_the_branch_ssley(name, ssley, tmp_path):
    """The README's commands: pre-training, then a linear classifier on the frozen backbone, each with its file."""
    run = ssley.pretrain(name)
    given = [f"pretrained_feature_extractor={run}", "backbone.name=tiny", "++limit_train_batches=2", "devices=1"]
    given += [f"data.{split}_path=datasets/imagenet-100/{split}" for split in ("train", "val")]  # barlow's are absolute
    given += ["++data.augmentations.crop_size=32", "max_epochs=1", "wandb.enabled=False", f"checkpoint.dir={tmp_path}"]
    ssley(main_linear.main, [*ssley.words("main_linear", name), *ssley.small, *given])
    (folder,) = tmp_path.glob("linear/*")
    found = json.loads((folder / "linear.json").read_text())
    assert found["checkpoint"].startswith(run) and found["train_images"] == 240 and 0 <= found["acc1"] <= 100
    config = found["config"]
    assert (config["scheduler"]["name"], config["scheduler"]["lr_decay_steps"]) == ("step", [60, 80])


@pytest.mark.slow
def test_knn_sh_of_the_branch_ssley(ssley, tmp_path):
    """Two features, eight numbers of neighbours up to 200, the euclidean distance and eight temperatures of cosines."""
    few = ["--num_workers", "0", "--output", str(tmp_path / "knn.json")]
    ssley(main_knn.main, [*ssley.words("main_knn", run=ssley.pretrain("ssley")), *few])
    rows = json.loads((tmp_path / "knn.json").read_text())
    assert len(rows) == 2 * 8 * (1 + 8) and len({tuple(list(row.values())[:4]) for row in rows}) == len(rows)
    assert all(0 <= row["acc1"] <= row["acc5"] <= 100 for row in rows)


@pytest.mark.slow
@pytest.mark.sample("isoloss")
@pytest.mark.parametrize("name", ["isoloss", "byol", "ssley"])
def test_unlabelled_images_count_as_wrong_and_not_in_the_loss(name, composed):
    """STL-10: of 8 images two have a label, the classifier is right about one; with no label at all the loss is 0."""
    cfg = parse_pretrain(composed(name))
    model = method_class(cfg)(cfg).train()
    logged = {}
    model.log_dict = lambda metrics, **_: logged.update(
        {name: float(value.detach()) for name, value in metrics.items()}
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, *[0.0] * 8]))
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)]
    log_sum = math.log(9 + math.e)
    for labels, loss, acc1 in (([1, 4, *[-1] * 6], log_sum - 0.5, 12.5), ([-1] * 8, 0.0, 0.0)):
        total = model.training_step((torch.arange(8), views, torch.tensor(labels)), 0)
        total.backward()
        assert logged["train_class_loss"] == pytest.approx(loss, abs=1e-6)
        assert logged["train_acc1"] == acc1
        assert all(math.isfinite(value) for value in [*logged.values(), float(total.detach())])
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# the forks' own files


def _checkouts() -> list:
    root = os.environ.get(CHECKOUTS)
    if not root:
        why = f"NOT TESTED: the forks' own 24 files, since {CHECKOUTS} names no folder of their checkouts"
        return [pytest.param(None, marks=pytest.mark.skip(reason=why))]
    isoloss, ssley = Path(root) / "implicit-var-reg", Path(root) / "solo-learn-ssley"
    found = sorted([*isoloss.glob("scripts/pretrain/*/*.yaml"), *ssley.glob("scripts/*/*/ssley.yaml")])
    assert len(found) == 24, f"{root} holds {len(found)} of the forks' 24 files"
    return [pytest.param(path, id="-".join(path.parts[-3:])) for path in found]


@pytest.mark.slow
@pytest.mark.parametrize("path", _checkouts())
def test_the_forks_own_files(path, digits, tmp_path):
    """Each file composes unchanged and builds the method that its entries define."""
    linear = path.parts[-3] == "linear"
    forced = _forced(digits)
    if linear:
        (tmp_path / "any.ckpt").touch()
        forced.append(f"pretrained_feature_extractor={tmp_path / 'any.ckpt'}")
    with initialize_config_dir(str(path.parent), version_base="1.2"):
        cfg = compose(path.stem, forced)
    theirs = OmegaConf.load(path)  # the file by itself
    if linear:
        cfg = parse_linear(cfg)
        assert list(cfg.scheduler.lr_decay_steps) == [60, 80] and cfg.optimizer.lr == 0.3
        return
    cfg = parse_pretrain(cfg)
    model = method_class(cfg)(cfg)
    given = theirs.method_kwargs
    ours = {"ssley": "ssl_ey"}.get(theirs.method, theirs.method)
    assert type(model) is plugin_methods()[ours]
    assert model.projector[-1].out_features == given.proj_output_dim
    assert model.projector[0].out_features == given.proj_hidden_dim
    if ours == "ssl_ey":
        assert not model.log_eigvals
    else:
        assert model.log_eigvals is given.log_eigvals is True
        assert model.options["metric"] == ("euclidean" if given.use_l2 else "cosine")
        assert model.has_teacher is (theirs.momentum.final_tau > 0) is ("noema" not in path.name)
    if ours == "directpred":
        pairs = {"alpha": "dp_alpha", "eps": "eps_iso", "rho": "dp_tau", "normalize": "dp_normalize", "iso": "iso"}
        assert all(model.options[mine] == given[their] for mine, their in pairs.items())
        assert model.options["iso"] is ("isoloss" in path.name)
    steps = theirs.get("accumulate_grad_batches", 1)
    scale = theirs.optimizer.batch_size * len(theirs.devices) / 256 * steps
    assert model.lr == pytest.approx(theirs.optimizer.lr * scale)
    assert model.classifier_lr == pytest.approx(theirs.optimizer.classifier_lr * scale)
    assert model.weight_decay == float(theirs.optimizer.weight_decay)
    assert cfg.max_epochs == theirs.max_epochs and cfg.wandb.enabled and cfg.wandb.entity is None
