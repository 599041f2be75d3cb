"""Self-Supervised-Vision: the grammar of its YAML files, their translation, and the task ``train``.

The files are ours, configs/ssv, which have the same entries. With SSV_CHECKOUT naming a checkout, its eleven files are
read too.
"""

import copy
import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torchvision import transforms as T

from plugins.distributed import LOCAL
from plugins.methods import METHODS
from plugins.spec import Embeddings
from plugins.tools.command import UserError
from plugins.tools.steps import STEPS, build_step, build_steps
from solo_ext.checkpoint import find_checkpoint, read_checkpoint
from solo_ext.compat.optim import EpochWarmupLR
from solo_ext.config import parse_pretrain
from solo_ext.main_pretrain import pretrain
from solo_ext.registry import method_class
from solo_ext.ssv import train as training
from solo_ext.ssv import translate as translation
from solo_ext.ssv.command import PACKAGED, change_entries, main, read_document, run
from solo_ext.ssv.grammar import ADDED, ALGORITHMS, ARCHS, check
from solo_ext.ssv.repairs import announcements
from solo_ext.ssv.translate import run_folder, translate
from solo_ext.transforms import evaluation_transform, pretrain_transform

pytestmark = pytest.mark.solo

ROOT = Path(__file__).parents[2]
CHECKOUT = "SSV_CHECKOUT"
ALGOS = sorted(ALGORITHMS)
ORIGINAL = [algo for algo in ALGOS if algo not in ADDED]


def _file(algo: str) -> dict[str, Any]:
    return yaml.safe_load((PACKAGED / f"{algo}.yaml").read_text())


def _arch(algo: str) -> str:
    return "vit" if algo == "dino" else "resnet18"


def _plain(document: dict[str, Any], algo: str, arch: str | None = None, **options: Any) -> dict[str, Any]:
    return OmegaConf.to_container(translate(document, algo, arch or _arch(algo), **options))


def _leaves(section: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _other(key: str, value: Any) -> Any:
    """Return another value of the same kind: numbers are halved."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return max(value // 2, 1) if isinstance(value, int) and value > 0 else value / 2 if value else 3
    if isinstance(value, list):
        return value[::-1] if isinstance(value[0], str) else [_other(key, one) for one in value]
    if key == "name":
        return {"sgd": "adam", "adam": "adamw", "adamw": "adam"}.get(value)
    return {"dataset_name": "cifar100", "root": "elsewhere"}.get(key, {"p": 0.25})


# the grammar


# entries without effect on the training; those of linear_eval are read by the evaluation
IGNORED = (
    *("optimizer.momentum", "optimizer.nesterov", "loss_fn.normalize", "wandb.", "linear_eval."),
    "data.multicrop_config.train_transforms.random_resized_crop.",  # a view has the size and the scale of its kind
)


@pytest.mark.parametrize("algo", ALGOS)
def test_every_entry_reaches_the_configuration(algo):
    """An entry with another value makes another configuration, or an error that names it."""
    document = check(_file(algo), algo)
    before, seen = _plain(document, algo), 0
    for path, value in _leaves(_file(algo)):
        name = ".".join(path)
        ignored = name.startswith(IGNORED) or (algo, name) == ("dino", "optimizer.weight_decay")
        ignored = ignored or (algo == "deep_cluster" and path[0] == "loss_fn")
        if path[-1] == "to_tensor" or (ignored and not isinstance(value, int | float)):
            continue
        changed = copy.deepcopy(_file(algo))
        section = changed
        for key in path[:-1]:
            section = section[key]
        other = _other(path[-1], value)
        if path[-1] == "batch_size" and path[0] == "data":
            other = value // 4
        section[path[-1]] = other
        try:
            after = _plain(changed, algo)
        except UserError as error:
            assert path[-1].partition("_")[2] in str(error) or path[-1] in str(error), (name, str(error))
            after = None
        assert (after == before) == ignored or (ignored and after is None), name
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("algo", ALGOS)
def test_unknown_entries_are_errors_of_one_line(algo):
    """In every section of the file."""
    document = _file(algo)
    sections = {path[:depth] for path, _ in _leaves(document) for depth in range(len(path))}
    for path in sections:
        changed = copy.deepcopy(document)
        section: Any = changed
        for key in path:
            section = section[key]
        section["unknwon"] = 1
        if algo == "deep_cluster" and path == ("loss_fn",):
            check(changed, algo)  # the original's class reads nothing of it
            continue
        with pytest.raises(UserError, match=r"no (entry|option) 'unknwon'|there is no transform 'unknwon'") as error:
            check(changed, algo)
        assert "\n" not in str(error.value)
        assert all(key in str(error.value) for key in path[-1:]), (path, str(error.value))


@pytest.mark.parametrize(
    ("algo", "entries", "sentence"),
    [
        ("byol", {"tua": 0.9}, "the configuration has no entry 'tua'; did you mean tau?"),
        ("byol", {"optimizer.lr": None}, "the configuration needs a value for optimizer.lr"),
        ("byol", {"optimizer": None}, "the configuration needs a value for optimizer"),
        (
            "byol",
            {"data.dataset_name": "cifar"},
            "unknown data.dataset_name 'cifar'; choose from cifar10, cifar100, dig",
        ),
        (
            "simclr",
            {"loss_fn.normalize": False},
            "loss_fn.normalize must be true: the loss compares rows of unit length",
        ),
        (
            "simclr",
            {"data.transforms.train.random_gray": 0.2},
            "random_gray must be a mapping of its options, or empty",
        ),
        (
            "simclr",
            {"data.transforms.train.random_gray.q": 1},
            "random_gray has no option 'q'; known options: p, apply_",
        ),
        ("simclr", {"data.transforms.train.color_jitter.hue": 2}, "color_jitter does not accept .*hue"),
        (
            "simclr",
            {"data.transforms.train.normalize.std": [1, 1]},
            "normalize does not accept .*std must be three numb",
        ),
        ("simclr", {"data.transforms.test": {"normalize": {}}}, "normalize needs a tensor: put to_tensor before it"),
        ("simclr", {"data.transforms.test": {"center_crop": {"size": 9}}}, "do not end in tensors; add to_tensor"),
        (
            "simclr",
            {"data.transforms.train.random_crop": {"size": 99}},
            "do not fit images of 32 x 32 pixels: Required",
        ),
        (
            "simclr",
            {"data.transforms.train.random_resized_crop.size": [8, 9]},
            "size must be one number, or two that are",
        ),
        ("sela", {"scheduler.milestones": None}, "scheduler.milestones must be a list of epochs, got None"),
        ("pirl", {"num_patches": 9}, "patches of 16 pixels make 2 x 2 patches, got num_patches 9"),
    ],
)
def test_mistakes(algo, entries, sentence):
    document = change_entries(_file(algo), [f"{key}={json.dumps(value)}" for key, value in entries.items()])
    with pytest.raises(UserError, match=sentence) as error:
        translate(document, algo, _arch(algo))
    assert "\n" not in str(error.value)


def test_networks_of_one_algorithm():
    for arch, owner in (("vit", "dino"), ("regnet_y_400mf", "seer")):
        assert translate(_file(owner), owner, arch)
        with pytest.raises(UserError, match=f"--arch {arch} is only available with --algo {owner}"):
            translate(_file("byol"), "byol", arch)
    for arch in set(ARCHS) - {"vit", "regnet_y_400mf"}:
        for stem, bottom in (("3x3", True), ("7x7", False)):
            document = {**_file("byol"), "encoder": {"reduce_bottom_conv": bottom}}
            assert _plain(document, "byol", arch)["backbone"] == {"name": arch, "kwargs": {"stem": stem}}
    # the original's DINO stops with an error if its network is a ResNet
    assert _plain(_file("dino"), "dino", "resnet50")["backbone"]["kwargs"] == {"stem": "3x3"}


@pytest.mark.parametrize("algo", ORIGINAL)
def test_the_originals_own_file(algo):
    """It has the entries and the values of ours."""
    if not os.environ.get(CHECKOUT):
        pytest.skip(f"NOT TESTED: the original's own files, since {CHECKOUT} names no checkout of it")
    theirs = yaml.safe_load((Path(os.environ[CHECKOUT]) / "configs" / f"{algo}.yaml").read_text())
    documents = [check(document, algo) for document in (theirs, _file(algo))]
    for document in documents:
        document["linear_eval"].pop("input_dim", None)
    assert documents[0] == documents[1]
    assert _plain(theirs, algo) == _plain(_file(algo), algo)


@pytest.mark.parametrize(("algo", "arch"), [("dino", "vit"), ("seer", "regnet_y_400mf"), ("byol", "resnext50")])
def test_further_networks_are_built(algo: str, arch: str) -> None:
    small = ["proj_head.proj_dim=16"] if algo == "dino" else []
    cfg = parse_pretrain(translate(change_entries(_file(algo), small), algo, arch))
    model = method_class(cfg)(cfg).eval()
    width = {"vit": 384, "regnet_y_400mf": 440, "resnext50": 2048}[arch]
    for side in {view.crop_size for view in cfg.augmentations}:
        assert model.backbone(torch.zeros(2, 3, side, side)).shape == (2, width)


# learning rates


def _original_rates(
    lr: float, epochs: int, warmup: int, decay: str, milestones: list[int], gamma: float
) -> list[float]:
    """Learning rate in each epoch: the loop of the original, which changes it after an epoch."""
    rates, rate, steps = [], lr / warmup if warmup else lr, 0
    for epoch in range(1, epochs + 1):
        rates.append(rate)
        if epoch <= warmup:
            rate = lr * epoch / warmup
            continue
        steps += 1
        if decay == "cosine":
            rate = lr * (1 + math.cos(math.pi * steps / (epochs - warmup))) / 2
        elif decay == "step" and steps in milestones:
            rate *= gamma
    return rates


@pytest.mark.parametrize(
    ("epochs", "warmup", "decay", "milestones"),
    [
        (1000, 10, "cosine", []),
        (1000, 0, "cosine", []),
        (500, 0, "step", [100, 250, 400]),
        (300, 2, "step", [250, 280]),
        (30, 5, "none", []),
        (3, 10, "cosine", []),
    ],
)
def test_learning_rate_of_every_epoch(epochs, warmup, decay, milestones):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = EpochWarmupLR(optimizer, warmup, epochs, decay=decay, milestones=milestones, factor=0.2)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(_original_rates(2.0, epochs, warmup, decay, milestones, 0.2), rel=1e-12, abs=1e-15)
    # lr max(1, e - 1) / W in epoch e = 1 ... W + 1
    assert found[: warmup + 1] == pytest.approx([2.0 * max(1, e) / max(warmup, 1) for e in range(warmup + 1)][:epochs])


def test_the_learning_rate_is_that_of_the_file_for_any_batch_and_devices():
    for devices in (1, 2):
        cfg = parse_pretrain(translate({**_file("simclr"), "epochs": 3}, "simclr", "resnet18", devices=devices))
        assert cfg.optimizer.lr == pytest.approx(2.0) and cfg.optimizer.batch_size == 512 // devices
    with pytest.raises(UserError, match="batch_size must be a multiple of --devices 3, got 512"):
        translate(_file("simclr"), "simclr", "resnet18", devices=3)


# transforms


def _pipeline(algo: str, document: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """Return the transforms of a configuration: of all views, and of evaluation, and the configuration."""
    cfg = parse_pretrain(translate(document or _file(algo), algo, _arch(algo)))
    view = cfg.augmentations[0]
    return pretrain_transform(cfg), evaluation_transform("cifar10", 32, view), cfg


def _steps(transform: T.Compose) -> list[Any]:
    return [type(step) for step in transform.transforms]


def test_transforms_have_the_order_of_the_file():
    document = _file("simclr")
    order = [T.RandomApply, T.RandomGrayscale, T.RandomResizedCrop, T.RandomHorizontalFlip, T.ToTensor, T.Normalize]
    views, evaluation, _ = _pipeline("simclr")
    (crops,) = views.transforms
    assert crops.num_crops == 2 and _steps(crops.transform) == order
    jitter, gray, crop, flip, _, normalize = crops.transform.transforms
    assert (jitter.p, gray.p, flip.p, crop.size, crop.scale) == (0.8, 0.2, 0.5, [32, 32], [0.2, 1.0])
    assert jitter.transforms[0].hue == (-0.1, 0.1) and normalize.std == [0.2470, 0.2435, 0.2616]
    assert _steps(evaluation) == [T.CenterCrop, T.ToTensor, T.Normalize]
    # the first two steps after the flip
    train = document["data"]["transforms"]["train"]
    names = [*list(train)[2:4], *list(train)[:2], *list(train)[4:]]
    document["data"]["transforms"]["train"] = {name: train[name] for name in names}
    changed, _, _ = _pipeline("simclr", document)
    assert _steps(changed.transforms[0].transform) == [*order[2:4], *order[:2], *order[4:]]


def test_a_transform_is_built_twice_in_the_same_way():
    """The original's function removes apply_prob from the configuration: the second transform always jitters."""
    options = {"hue": 0.1, "apply_prob": 0.8}
    assert build_step("color_jitter", options).p == build_step("color_jitter", options).p == 0.8


def test_pirl_cuts_a_changed_image_into_cells():
    views, _, cfg = _pipeline("pirl")
    image = Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy())
    whole, cells = views(image)
    assert whole.shape == (3, 32, 32) and cells.shape == (4, 3, 16, 16)
    cut = views.transforms[1].transform
    first = [step for step in cut.transforms[:-1] if not isinstance(step, T.RandomHorizontalFlip)]
    assert [type(step) for step in first] == [T.RandomApply, T.RandomGrayscale, T.RandomResizedCrop]
    assert _steps(cut.transforms[-1].each) == [T.ToTensor, T.Normalize]
    # without random changes, the cells are those of the image, in random order
    parts = T.Compose([cut.transforms[-1]])(image)
    wanted = cut.transforms[-1].each(image)
    rows = {tuple(cell.flatten().tolist()) for cell in parts}
    quarters = [wanted[:, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
    assert rows == {tuple(quarter.flatten().tolist()) for quarter in quarters}
    assert cfg.method_kwargs.patches == 4


def test_views_of_the_other_algorithms():
    views, evaluation, cfg = _pipeline("dino")
    large, small = (transform.transform.transforms[2] for transform in views.transforms)
    assert (large.size, large.scale, small.size, small.scale) == ([32, 32], [0.3, 1.0], [8, 8], [0.08, 0.3])
    assert [transform.num_crops for transform in views.transforms] == [2, 6] and "eval_steps" in cfg.augmentations[0]
    assert _steps(evaluation) == [T.CenterCrop, T.ToTensor, T.Normalize]
    views, _, _ = _pipeline("cpc")
    stack = views.transforms[0].transform
    assert _steps(stack)[:2] == [T.RandomCrop, T.RandomHorizontalFlip]
    assert _steps(stack.transforms[-1].each) == [T.RandomApply, T.RandomGrayscale, T.ToTensor, T.Normalize]
    assert views(Image.new("RGB", (32, 32)))[0].shape == (25, 3, 10, 10)
    views, _, cfg = _pipeline("amdim")
    assert cfg.shared_flip == 0.5
    assert T.RandomHorizontalFlip not in _steps(views.transforms[0].transforms[0].transform)
    views, evaluation, _ = _pipeline("sela")
    assert views.transforms[0].num_crops == 1 and _steps(evaluation) == [T.CenterCrop, T.ToTensor, T.Normalize]


def test_every_transform_changes_an_image():
    options = {
        "random_crop": {"size": 16},
        "random_resized_crop": {"size": 16},
        "center_crop": {"size": 16},
        "resize": {"size": 16},
        "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "cutout": {"n_cuts": 3, "max_len": 9},
        "color_jitter": {"brightness": 0.9},
        "random_gray": {"p": 1.0},
        "random_flip": {"p": 1.0},
    }
    torch.manual_seed(0)
    image = Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy())
    plain = T.ToTensor()(image)
    for name in sorted(set(STEPS) - {"to_tensor"}):
        of_tensors = name in ("normalize", "cutout")
        step = {name: options.get(name)}
        transform = build_steps(["to_tensor", step] if of_tensors else [step, "to_tensor"])
        changed = [transform(image) for _ in range(5)]
        assert any(one.shape != plain.shape or not torch.equal(one, plain) for one in changed), name
        if name == "cutout":  # three squares of at most 8 pixels
            sizes = [(one == 0).all(0).sum() - (plain == 0).all(0).sum() for one in changed]
            assert 0 < max(sizes) <= 3 * 64


def test_transforms_are_torchvisions() -> None:
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


# heads and losses

W, D = 512, 128
# parameters of projection head and predictor: Linear with bias, BatchNorm 2 numbers a channel
HEADS = {
    "byol": (W * W + 3 * W + W * D + D, 2 * (D * D + D) + 2 * D),
    "relic": (W * W + 3 * W + W * D + D, 2 * (D * D + D) + 2 * D),
    "simclr": (W * W + 3 * W + W * D + 3 * D, 0),
    "moco": (W * D + D, 0),
    "barlow": (W * 4096 + 3 * 4096 + 4096**2 + 3 * 4096 + 4096**2 + 4096, 0),
    "swav": (W * W + 3 * W + W * D + 3 * D, 3000 * D),
    "simsiam": (W * 1024 + 2 * 1024**2 + 9 * 1024, 1024 * 128 + 3 * 128 + 128 * 1024 + 1024),
    "pirl": (2 * (W * D + D) + 4 * D * D + D, 0),
    "sela": (10 * (W * 128 + 128), 0),
    "dino": (W * 512 + 2 * 512**2 + 3 * 512 + 512 * 1024 + 2 * 1024, 0),
    "deep_cluster": (W * 10 + 10, 0),
}


@pytest.mark.parametrize("algo", ORIGINAL)
def test_heads_have_the_layers_of_the_original(algo):
    cfg = translate(_file(algo), algo, "resnet18")
    spec = METHODS[cfg.method]
    options = spec.resolve(OmegaConf.to_container(cfg.method_kwargs))
    head = spec.head(W, options)
    predictor = spec.predictor(options, LOCAL) if spec.predictor else nn.Identity()
    assert tuple(sum(p.numel() for p in part.parameters()) for part in (head, predictor)) == HEADS[algo]
    rows = head(torch.randn(8, W))
    assert rows.shape == (
        8,
        {"barlow": 4096, "simsiam": 1024, "sela": 1280, "dino": 1024, "deep_cluster": 10}.get(algo, D),
    )
    if algo in ("swav", "barlow"):
        assert torch.allclose(rows.norm(dim=1), torch.full((8,), math.sqrt(4096) if algo == "barlow" else 1.0))
    kinds = [type(module) for module in head.modules()]
    assert (nn.GELU in kinds) == (algo in ("swav", "dino"))


def _loss(algo: str, **changes: Any) -> nn.Module:
    cfg = translate({**_file(algo), **changes}, algo, "resnet18")
    spec = METHODS[cfg.method]
    return spec.loss(spec.resolve(OmegaConf.to_container(cfg.method_kwargs)), LOCAL)


def test_scale_of_byols_loss():
    """The original's loss is the mean squared difference of the elements of unit rows, for both orders."""
    torch.manual_seed(0)
    p, target = torch.randn(2, 6, 128), torch.randn(2, 6, 128)
    units = [F.normalize(rows, dim=2) for rows in (p, target)]
    wanted = F.mse_loss(units[0][0], units[1][1]) + F.mse_loss(units[0][1], units[1][0])
    found = _loss("byol")(Embeddings([*p], [*p], [*target])).loss
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_scale_of_selas_and_swavs_losses():
    torch.manual_seed(0)
    logits, loss = torch.randn(6, 10 * 128), _loss("sela")
    loss.table.allocate(6)
    loss.clock()
    labels = loss.table.read(torch.arange(6))
    heads = zip(logits.unflatten(1, (10, 128)).unbind(1), labels.long(), strict=True)
    wanted = sum(F.cross_entropy(rows, own) for rows, own in heads)
    found = loss(Embeddings([logits], [logits], [logits], (), torch.arange(6))).loss
    assert torch.allclose(found, wanted, rtol=1e-5)
    # zero scores: log K, times batch / (batch + bank)
    zeros = [torch.zeros(6, 3000)] * 2
    found = _loss("swav")(Embeddings([torch.zeros(6, 128)] * 2, zeros, zeros)).loss
    assert float(found) == pytest.approx(math.log(3000) * 512 / 3512, rel=1e-5)


def test_free_prototypes_are_compared_by_their_directions():
    cfg = translate(_file("swav"), "swav", "resnet18")
    spec = METHODS["swav"]
    prototypes = spec.predictor(spec.resolve(OmegaConf.to_container(cfg.method_kwargs)), LOCAL)
    z = F.normalize(torch.randn(4, 128), dim=1)
    before = prototypes.weight.detach().clone()
    (scores,) = prototypes.predict([z])
    assert torch.equal(prototypes.weight, before) and before.norm(dim=1).mean() > 10
    assert torch.allclose(scores, z @ F.normalize(before, dim=1).T, atol=1e-6)
    scores.sum().backward()
    # the gradient is orthogonal to the row
    assert (prototypes.weight.grad * before).sum(1).abs().max() < 1e-4


def test_announcements_name_every_fault():
    for algo in ALGOS:
        lines = announcements(algo)
        assert all(line.startswith(("repaired: ", "kept: ")) and "\n" not in line for line in lines)
        assert lines or algo == "simclr"  # whose code has no fault


# runs


def _small(algo: str, digits: Path, **changes: Any) -> dict[str, Any]:
    """Return a file for a run of two epochs with images of 16 pixels."""
    document = _file(algo)
    data = document["data"]
    data |= {"dataset_name": "digits", "root": str(digits), "batch_size": 32, "num_workers": 0}
    if "multicrop_config" in data:
        data["multicrop_config"] |= {"global_size": 16, "local_size": 8, "num_local_views": 1}
    else:
        for steps in data["transforms"].values():
            for name in ("random_resized_crop", "center_crop"):
                if name in steps:
                    steps[name]["size"] = 16
    small = {
        "moco": {"queue_size": 32},
        "barlow": {"proj_dim": 64},
        "pirl": {"num_negatives": 16, "patch_size": 8},
        "swav": {"prototype_size": 16, "feature_bank_size": 32},
        "seer": {"prototype_size": 16},
        "sela": {"num_clusters": 4, "num_cluster_heads": 2},
        "dino": {"encoder": {"num_global_patches": 16}},
        "cpc": {"patch_size": 8, "stride": 4},
    }
    if algo == "cpc":
        data["transforms"]["train"]["random_crop"] = {"size": 16, "padding": 2}
    return {**document, "epochs": 2, "eval_every": 1, "linear_eval": {"epochs": 1}, **small.get(algo, {}), **changes}


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["byol", "cpc", "dino", "seer"])
def test_a_step_on_the_networks_of_the_command(algo, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = translate(_small(algo, digits), algo, _arch(algo))
    cfg.checkpoint.enabled = False
    once = {"limit_train_batches": 1, "limit_val_batches": 0, "max_epochs": 1}
    models: list[Any] = []
    before: dict[str, torch.Tensor] = {}

    class Keep(training.pl.Callback):
        def on_train_start(self, trainer, module):
            models.append(module)
            before.update({name: value.detach().clone() for name, value in module.backbone.named_parameters()})

    folder = pretrain(OmegaConf.merge(cfg, once), lambda folder: [Keep()])
    (model,) = models
    assert folder == run_folder(algo, _arch(algo), "run")
    unmoved = [name for name, value in model.backbone.named_parameters() if torch.equal(value, before[name])]
    # without warm-up or with it, all weights move
    assert not unmoved
    assert math.isfinite(json.loads((folder / "pretrain.json").read_text())["metrics"]["train_ssl_loss"])


_TINY = {
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
_TRIALS = sorted(path.stem for path in (PACKAGED / "digits").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("algo", _TRIALS)
def test_every_algorithm_trains(
    algo: str, tiny: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two epochs on a tiny network, by the command with the trial's file; every parameter moves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(translation, "_backbone", lambda encoder, arch: ({"name": "tiny"}, 32))
    monkeypatch.setattr(training, "linear_eval", lambda arguments: None)
    argv = ["-c", str(PACKAGED / "digits" / f"{algo}.yaml"), "-a", algo, "-m", "resnet18", "-t", "train", "-o", "first"]
    entries = [f"data.root={digits}", "data.batch_size=32", "epochs=2", "eval_every=1", "scheduler.warmup_epochs=0"]
    run([*argv, *entries, *_TINY.get(algo, [])])
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
    run([*argv, *entries, *_TINY.get(algo, [])])  # it is complete: nothing is trained
    assert (folder / "trainlogs.txt").read_text().splitlines() == lines


def _write(document: dict[str, Any], folder: Path) -> Path:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


def _rates(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    column = next(name for name in rows[0] if name.startswith("lr-") and "backbone" in name)
    return [float(row[column]) for row in rows if row[column]]


@pytest.mark.slow
def test_a_run_resumes_where_it_was_stopped_and_leaves_the_originals_files(digits, tiny, tmp_path, monkeypatch, capsys):
    """byol, by the command: 90 images, so that the last batch of an epoch has 26; two of three epochs, then one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(translation, "_backbone", lambda encoder, arch: ({"name": "tiny"}, 32))
    few = tmp_path / "few"
    for image in [*sorted((digits / "train").glob("*/*"))[:90], *sorted((digits / "val").glob("*/*"))]:
        target = few / image.relative_to(digits)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(image)
    document = _small("byol", few, epochs=3, scheduler={"name": "cosine", "warmup_epochs": 1})
    file = _write(document, tmp_path)
    command = ["-c", str(file), "-a", "byol", "-m", "resnet18", "-t", "train", "-o"]
    run([*command, "whole"])

    def fail(callback: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(training.Hyperparameters, "on_train_epoch_start", fail)
        run([*command, "parts"])
    folders = [tmp_path / run_folder("byol", "resnet18", name) for name in ("whole", "parts")]
    assert not (folders[1] / "linear_eval.json").exists()
    capsys.readouterr()
    run([*command, "parts"])
    text = capsys.readouterr().out
    assert "resuming after epoch 2 of 3" in text
    assert text.splitlines()[:3] == announcements("byol")

    whole, parts = (read_checkpoint(find_checkpoint(folder)) for folder in folders)
    assert whole["global_step"] == 9, "three batches an epoch: the smaller last one is kept"
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    logs = [(folder / "trainlogs.txt").read_text() for folder in folders]
    assert logs[0] == logs[1] and logs[0].count("[VALID] Epoch") == 3
    written = yaml.safe_load((folders[0] / "hyperparameters.txt").read_text())
    assert written == check(document, "byol")
    # lr, lr (1 + cos 0) / 2, lr (1 + cos(pi / 2)) / 2
    assert _rates(folders[0]) == pytest.approx([0.2, 0.2, 0.1])
    # a finished run is not trained again, and its evaluation is not repeated
    evaluated = (folders[1] / "linear_eval.json").stat().st_mtime_ns
    run([*command, "parts"])
    assert "there is nothing left to train" in capsys.readouterr().out
    assert (folders[1] / "linear_eval.json").stat().st_mtime_ns == evaluated
    run([*command, "parts", "epochs=4"])  # but one that is made longer is evaluated again
    assert "resuming after epoch 3 of 4" in capsys.readouterr().out
    assert (folders[1] / "linear_eval.json").stat().st_mtime_ns > evaluated
    # the next run begins with these weights
    with monkeypatch.context() as patch:
        seen: list[Any] = []
        patch.setattr(
            training.Hyperparameters,
            "on_train_start",
            lambda callback, trainer, module: seen.append(
                [copy.deepcopy(part.state_dict()) for part in (module.backbone, module.momentum_backbone)]
            ),
        )
        patch.setattr(training, "linear_eval", lambda arguments: None)
        run([*command, "loaded", "--load", str(folders[0]), "epochs=1"])
    for state in seen[0]:
        assert all(torch.equal(value, whole["state_dict"][f"backbone.{name}"]) for name, value in state.items())


@pytest.mark.slow
def test_dinos_weight_decay_moves_and_gradients_are_clamped(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = _small("dino", digits, epochs=3, gradient_clip=1e-4)
    cfg = translate(document, "dino", "vit")
    cfg.checkpoint.enabled = False
    decays: list[float] = []
    largest: list[float] = []

    class Watch(training.pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            pass

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                decays.append(trainer.optimizers[0].param_groups[0]["weight_decay"])
                largest.append(max(p.grad.abs().max().item() for p in module.backbone.parameters()))

    pretrain(OmegaConf.merge(cfg, {"limit_train_batches": 1, "limit_val_batches": 0}), lambda folder: [Watch()])
    assert decays == pytest.approx([0.4 - 0.36 * (math.cos(math.pi * epoch / 3) + 1) / 2 for epoch in range(3)])
    assert max(largest) <= 1e-4


# the command


def test_missing_files_are_replaced_by_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert read_document(Path("configs/byol.yaml"), "byol") == _file("byol")
    assert capsys.readouterr().out == f"configs/byol.yaml does not exist: using {PACKAGED / 'byol.yaml'}\n"
    assert read_document(Path("configs/ssv/digits/byol.yaml"), "byol")["data"]["dataset_name"] == "digits"
    own = tmp_path / "configs" / "byol.yaml"
    own.parent.mkdir()
    own.write_text("epochs: 3\n")
    assert read_document(Path("configs/byol.yaml"), "byol") == {"epochs": 3}
    for wrong in ("byol.yaml", "other/byol.yaml", "configs/byl.yaml"):
        with pytest.raises(UserError, match=f"--config is not a file: {wrong}; ours are .*"):
            read_document(Path(wrong), "byol")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-t", "trian"], "argument -t/--task: invalid choice: 'trian'"),
        (["-t", "linear_eval"], "--task linear_eval needs a trained network: give its folder with --load"),
        (["-t", "train", "--devices", "0"], "--devices must be a number above 0, got 0"),
        (["-t", "train", "epochs"], "'epochs' is not key=value; see --help"),
        (["-t", "train", "epochs=["], "the value of 'epochs=[' is not valid YAML"),
        (["-t", "train", "epoch=3"], "the configuration has no entry 'epoch'; did you mean epochs?"),
        (["-t", "train", "data.dataset_name=digits", "data.root=nowhere"], "data.train_path is not a folder: nowhere"),
    ],
)
def test_errors_of_the_command(arguments, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "-c", "configs/byol.yaml", "-a", "byol", "-m", "resnet18", *arguments])
    monkeypatch.setattr("plugins.tools.process.end_with_first_process", lambda: None)
    with pytest.raises(SystemExit) as end:
        main()
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and errors[0].startswith(f"error: {sentence}"), errors
    assert not (tmp_path / "outputs").exists()


def test_main_py_of_the_checkout():
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "--config" in done.stdout and all(algo in done.stdout for algo in ALGOS)


@pytest.mark.slow
def test_methods_that_train():
    """All with heads of ours: solo-learn's own methods of these names have other ones."""
    for algo in ALGOS:
        cls = method_class(parse_pretrain(translate(_file(algo), algo, _arch(algo))))
        assert hasattr(cls, "spec") and cls.spec.name == translate(_file(algo), algo, _arch(algo)).method
