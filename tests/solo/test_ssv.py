"""Self-Supervised-Vision: its YAML files, command line, transforms and schedule, and a training of each algorithm."""

import csv
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torchvision import transforms as T

from plugins.methods import METHODS
from plugins.tools.command import UserError
from plugins.tools.steps import build_steps
from solo_ext.compat.optim import EpochWarmupLR
from solo_ext.config import parse_pretrain
from solo_ext.registry import method_class
from solo_ext.ssv import train, translate
from solo_ext.ssv.command import change_entries, read_document, run
from solo_ext.ssv.grammar import ADDED, ALGORITHMS, check
from solo_ext.ssv.repairs import KEPT, REPAIRS, announcements

pytestmark = pytest.mark.solo

ROOT = Path(__file__).parents[2]
FILES = ROOT / "configs" / "ssv"
CHECKOUT = "SSV_CHECKOUT"
"""Environment variable with the folder of a checkout of Self-Supervised-Vision, whose own files are then tested too."""


def _document(algo: str, *entries: str, folder: Path = FILES) -> dict:
    return check(change_entries(yaml.safe_load((folder / f"{algo}.yaml").read_text()), entries), algo)


# the files


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_learning_rate_of_a_file_is_that_of_the_optimiser(algo: str) -> None:
    """solo-learn multiplies the learning rate by the batch size over 256."""
    document = _document(algo)
    cfg = parse_pretrain(translate.translate(document, algo, "resnet18"))
    given, batch = document["optimizer"], document["data"]["batch_size"]
    assert cfg.optimizer.lr == pytest.approx(given["lr"], rel=1e-12)  # after parse_pretrain it is the final one
    assert (cfg.optimizer.name, cfg.optimizer.batch_size) == (given["name"], batch)
    assert (cfg.max_epochs, cfg.seed, cfg.precision) == (document["epochs"], 420, 32)
    assert cfg.backbone.kwargs.stem == "3x3"
    if given["name"] == "sgd":
        assert dict(cfg.optimizer.kwargs) == {"momentum": 0.9, "nesterov": True}
    assert not cfg.optimizer.exclude_bias_n_norm_wd and not cfg.data.drop_last


@pytest.mark.parametrize("algo", [algo for algo in ALGORITHMS if algo not in ADDED])
def test_the_original_files_say_the_same_as_ours(algo: str) -> None:
    if CHECKOUT not in os.environ:
        pytest.skip(f"NOT TESTED: the original's own files, since {CHECKOUT} names no checkout of it")
    theirs, ours = _document(algo, folder=Path(os.environ[CHECKOUT]) / "configs"), _document(algo)
    del theirs["linear_eval"]["input_dim"]  # ignored
    if algo == "deep_cluster":
        theirs["loss_fn"] = ours["loss_fn"]  # ignored
    assert theirs == ours


@pytest.mark.parametrize(
    ("algo", "entry", "message"),
    [
        ("byol", "temperature=0.1", "temperature"),
        ("byol", "data.transforms.train.random_flips=", "random_flips"),
        ("byol", "data.transforms.train.random_gray.q=0.1", "random_gray"),
        ("byol", "optimizer.learning_rate=0.1", "learning_rate"),
        ("simclr", "loss_fn.normalize=False", "loss_fn.normalize must be true"),
        ("sela", "scheduler.milestones=", "scheduler.milestones must be a list of epochs"),
        ("moco", "momentum=1.5", "momentum must be"),
        ("dino", "data.multicrop_config.scale_threshold=0", "scale_threshold"),
        ("cpc", "directions=5", "directions"),
    ],
)
def test_errors_of_a_file_name_the_entry(algo: str, entry: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        _document(algo, entry)
    assert message in str(error.value) and "\n" not in str(error.value).strip()


def test_a_missing_file_is_ours_and_a_wrong_name_is_an_error(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    try:
        assert read_document(Path("configs/byol.yaml"), "byol") == yaml.safe_load((FILES / "byol.yaml").read_text())
        assert capsys.readouterr().out.startswith("configs/byol.yaml does not exist: using ")
        with pytest.raises(UserError, match=r"--config is not a file: configs/byl\.yaml; .* did you mean byol\.yaml\?"):
            read_document(Path("configs/byl.yaml"), "byol")
    finally:
        os.chdir(ROOT)


# the translation


def test_settings_that_belong_to_the_original() -> None:
    """Widths of 512 and 2048, and the factors of the losses that its learning rates belong to."""

    def method(algo: str, arch: str = "resnet18", *entries: str) -> tuple[dict, dict]:
        cfg = translate.translate(_document(algo, *entries), algo, arch)
        return dict(cfg.method_kwargs), dict(cfg.get("momentum", {}))

    assert method("byol")[0] == {
        **{"proj_hidden_dim": 512, "proj_output_dim": 128, "pred_hidden_dim": 128},
        "scale_loss": 1 / 128,
    }
    assert method("relic", "wide_resnet50")[0]["proj_hidden_dim"] == 2048
    assert method("byol")[1] == {"base_tau": 0.996, "final_tau": 1.0}
    assert method("moco")[1] == {"base_tau": 0.999, "final_tau": 0.999}
    assert method("swav")[0]["scale_loss"] == 512 / (512 + 3000)
    options = method("sela")[0]
    assert (options["label_updates"], options["max_iter"], options["scale_loss"]) == (80, 1000, 10.0)
    assert method("sela", "resnet18", "self_label_iters=2000")[0]["max_iter"] == 2000
    clip = translate.translate(_document("dino"), "dino", "vit")
    assert (clip.gradient_clip_val, clip.gradient_clip_algorithm) == (3.0, "value")
    assert (clip.optimizer.weight_decay, clip.optimizer.final_weight_decay) == (0.04, 0.4)
    assert [(view.crop_size, view.num_crops) for view in clip.augmentations] == [(32, 2), (8, 6)]
    with pytest.raises(UserError, match="--arch vit is only available with --algo dino"):
        translate.translate(_document("byol"), "byol", "vit")


_LINEAR, _NORM = "Linear", "BatchNorm1d"
_HEADS = {
    "simclr": [_LINEAR, _NORM, "ReLU", _LINEAR, _NORM],
    "moco": [_LINEAR],
    "byol": [_LINEAR, _NORM, "ReLU", _LINEAR],
    "relic": [_LINEAR, _NORM, "ReLU", _LINEAR],
    "swav": [_LINEAR, _NORM, "GELU", _LINEAR, _NORM],
    "barlow": [_LINEAR, _NORM, "ReLU", _LINEAR, _NORM, "ReLU", _LINEAR],
    "simsiam": [_LINEAR, _NORM, "ReLU", _LINEAR, _NORM, "ReLU", _LINEAR, _NORM],
}


@pytest.mark.parametrize("algo", _HEADS)
def test_layers_of_the_head(algo: str) -> None:
    """Linear layers have biases; the width of the hidden layers is that of the features, or that of the file."""
    options = dict(translate.translate(_document(algo), algo, "resnet18").method_kwargs)
    spec = METHODS[translate.METHODS[algo](_document(algo), 512).name]
    head = spec.head(512, spec.resolve(options))
    layers = [m for m in head.modules() if type(m) in (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.GELU)]
    assert [type(layer).__name__ for layer in layers] == _HEADS[algo]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    hidden = {"barlow": 4096, "simsiam": 1024}.get(algo, 512)
    out = {"barlow": 4096, "simsiam": 1024}.get(algo, 128)
    assert [layer.out_features for layer in linear] == [hidden] * (len(linear) - 1) + [out]
    assert all(layer.bias is not None for layer in linear)
    assert all(layer.affine for layer in layers if isinstance(layer, nn.BatchNorm1d))


def test_transforms_act_in_the_order_of_the_file() -> None:
    """The order changes the result: the jitter of a part of an image is not the part of the jittered image."""
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    steps = {
        "color_jitter": {**jitter, "apply_prob": 0.8},
        "random_gray": {"p": 0.2},
        "random_resized_crop": {"size": [16, 16], "scale": [0.2, 1.0]},
        "random_flip": None,
        "to_tensor": None,
        "normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    }
    expected = T.Compose(
        [
            T.RandomApply([T.ColorJitter(**jitter)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomResizedCrop((16, 16), scale=(0.2, 1.0)),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]),
        ]
    )
    image = T.ToPILImage()(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    ours = build_steps({name: options} for name, options in steps.items())
    for seed in range(10):
        torch.manual_seed(seed)
        found = ours(image)
        torch.manual_seed(seed)
        assert torch.equal(found, expected(image))


@pytest.mark.parametrize(("warmup", "epochs"), [(10, 1000), (0, 20), (2, 7)])
def test_the_learning_rate_of_each_epoch(warmup: int, epochs: int) -> None:
    """Epoch e = 1 … E of the original, whose warm-up divides by W and repeats its first step."""
    parameter = nn.Parameter(torch.zeros(1))
    schedule = EpochWarmupLR(torch.optim.SGD([parameter], lr=0.2), warmup, epochs)
    stepped = EpochWarmupLR(
        torch.optim.SGD([parameter], lr=0.2), warmup, epochs, decay="step", milestones=[2, 3], factor=0.1
    )
    for epoch in range(1, epochs + 1):
        if warmup and epoch <= warmup:
            expected = steps = 0.2 * max(1, epoch - 1) / warmup
        else:
            expected = 0.2 * (1 + math.cos(math.pi * (epoch - 1 - warmup) / (epochs - warmup))) / 2
            steps = 0.2 * 0.1 ** sum(epoch > warmup + milestone for milestone in (2, 3))
        assert schedule.get_last_lr()[0] == pytest.approx(expected, rel=1e-12)
        assert stepped.get_last_lr()[0] == pytest.approx(steps, rel=1e-12)
        schedule.optimizer.step(), schedule.step(), stepped.optimizer.step(), stepped.step()


def test_every_algorithm_names_its_repairs() -> None:
    assert set(REPAIRS) == set(ALGORITHMS) and set(KEPT) <= set(ALGORITHMS)
    assert all("\n" not in line for algo in ALGORITHMS for line in announcements(algo))
    assert [line.split(":")[0] for line in announcements("byol")] == ["repaired", "repaired", "kept"]


@pytest.mark.parametrize(("algo", "arch"), [("dino", "vit"), ("seer", "regnet_y_400mf"), ("byol", "resnext50")])
def test_further_networks_are_built(algo: str, arch: str) -> None:
    document = _document(algo, *(["proj_head.proj_dim=16"] if algo == "dino" else []))
    cfg = parse_pretrain(translate.translate(document, algo, arch))
    model = method_class(cfg)(cfg).eval()
    width = {"vit": 384, "regnet_y_400mf": 440, "resnext50": 2048}[arch]
    for side in {view.crop_size for view in cfg.augmentations}:
        assert model.backbone(torch.zeros(2, 3, side, side)).shape == (2, width)


# the command


_SMALL = {
    "swav": ["prototype_size=8", "feature_bank_size=16"],
    "seer": ["prototype_size=8"],
    "sela": ["num_clusters=6", "num_cluster_heads=2", "self_label_iters=3"],
    "deep_cluster": ["num_classes=6"],
    "moco": ["queue_size=24"],
    "pirl": ["num_negatives=8", "num_patches=4", "patch_size=8"],
    "dino": ["proj_head.hidden_dim=16", "proj_head.proj_dim=8"],
    "barlow": ["proj_dim=16"],
    "simsiam": ["proj_dim=16", "bottleneck_dim=8"],
    "amdim": ["n_rkhs=16"],
}
_TRIALS = [path.stem for path in (FILES / "digits").glob("*.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("algo", _TRIALS)
def test_every_algorithm_trains(
    algo: str, tiny: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two epochs on a tiny network, by the command with the trial's file; every parameter moves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(translate, "_backbone", lambda encoder, arch: ({"name": "tiny"}, 32))
    monkeypatch.setattr(train, "linear_eval", lambda arguments: None)
    argv = ["-c", str(FILES / "digits" / f"{algo}.yaml"), "-a", algo, "-m", "resnet18", "-t", "train", "-o", "first"]
    entries = [f"data.root={digits}", "data.batch_size=32", "epochs=2", "eval_every=1", "scheduler.warmup_epochs=0"]
    run([*argv, *entries, *_SMALL.get(algo, [])])
    folder = tmp_path / "outputs" / algo / "resnet18" / "first"
    printed = capsys.readouterr().out
    assert all(line in printed for line in announcements(algo))
    written = yaml.safe_load((folder / "hyperparameters.txt").read_text())
    assert (written["epochs"], written["data"]["batch_size"]) == (2, 32)
    lines = (folder / "trainlogs.txt").read_text().splitlines()
    assert [line.split("]")[0] for line in lines] == ["[TRAIN", "[VALID"] * 2
    with (folder / "metrics.csv").open(newline="") as file:
        losses = [float(row["train_ssl_loss_epoch"]) for row in csv.DictReader(file) if row["train_ssl_loss_epoch"]]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    run([*argv, *entries, *_SMALL.get(algo, [])])  # it is complete: nothing is trained
    assert (folder / "trainlogs.txt").read_text().splitlines() == lines


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["-c", "configs/byol.yaml", "-a", "byol", "-m", "resnet18"]
    with pytest.raises(UserError, match="--task linear_eval needs a trained network: give its folder with --load"):
        run([*argv, "-t", "linear_eval"])
    with pytest.raises(UserError, match=r"data\.batch_size must be a multiple of --devices 3"):
        run([*argv, "-t", "train", "--devices", "3"])
    with pytest.raises(UserError, match="'epochs' is not key=value"):
        run([*argv, "-t", "train", "epochs"])
    assert not (tmp_path / "outputs").exists()
