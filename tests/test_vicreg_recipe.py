"""SSL-EY on ImageNet with VICReg's settings: what the commands of docs/migration.md set in the three frameworks."""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor, nn

from lightly_ext.benchmarks import schema
from lightly_ext.benchmarks.__main__ import main as lightly_main
from lightly_ext.benchmarks.methods import METHODS as LIGHTLY
from lightly_ext.benchmarks.setup import Setup
from plugins.tools import data, export
from solo_ext import main_linear, main_pretrain
from solo_ext.config import parse_pretrain
from solo_ext.registry import method_class
from solo_ext.transforms import view_transform
from vissl_ext.registry import register

register()

from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict  # noqa: E402

from vissl_ext.task import PluginTask, check_config  # noqa: E402

pytestmark = [pytest.mark.solo, pytest.mark.lightly, pytest.mark.vissl]
ROOT = Path(__file__).parents[1]
MODULES = {"solo": "solo_ext.main_pretrain", "vissl": "vissl_ext.launch", "lightly": "lightly_ext.benchmarks"}
LINEAR = {"solo": "solo_ext.main_linear", "lightly": "lightly_ext.benchmarks"}


def command(section: str, module: str, index: int = 0) -> list[str]:
    """The words after ``python -m MODULE`` in a section of the page."""
    page = (ROOT / "docs" / "migration.md").read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    found = re.findall(rf"^python -m {re.escape(module)} (.*)$", page.replace("\\\n", " "), re.MULTILINE)
    return shlex.split(found[index])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of 32 pixels in two classes, and a file of weights."""
    folder = tmp_path_factory.mktemp("vicreg")
    for split in ("train", "val"):
        for index in range(16):
            path = folder / "IMAGENET" / split / f"n{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 40 + index).convert("RGB").save(path)
    return folder


@pytest.fixture(autouse=True)
def in_folder(images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(images)
    yield


class Recipe(NamedTuple):
    """What a framework makes of a command."""

    batch: int
    optimizer: Any
    rate: Callable[[int], float]
    head: Any
    trunk: Any
    views: list[tuple[float, float]]
    """Probabilities of blur and of solarisation."""
    crop: tuple[str, float]
    """Filter and smallest scale."""
    jitter: tuple[float, ...]


def solo(words: list[str], epochs: int, per_epoch: int) -> Recipe:
    with initialize_config_dir(str(ROOT / "configs/solo/imagenet"), version_base="1.2"):
        cfg = parse_pretrain(compose("ssl_ey", [*words[4:], "++accelerator=cpu"]))
    assert (cfg.max_epochs, cfg.accumulate_grad_batches, cfg.backbone.kwargs.zero_init_residual) == (epochs, 1, True)
    with torch.device("meta"):
        module = method_class(cfg)(cfg)
    data = {"train_dataloader": [], "num_training_batches": per_epoch, "accumulate_grad_batches": 1}
    module._trainer = SimpleNamespace(estimated_stepping_batches=epochs * per_epoch, **data)
    (optimizer,), (described,) = module.configure_optimizers()
    assert (described["interval"], described["frequency"]) == ("step", 1)

    def rate(step: int) -> float:
        described["scheduler"].last_epoch = step
        return described["scheduler"].get_lr()[0]

    steps = [view_transform("imagenet", view).transforms for view in cfg.augmentations]
    crops = {(step.interpolation.value, step.scale[0]) for view in steps for step in view if hasattr(step, "ratio")}
    (jitter,) = {tuple(view.color_jitter.values()) for view in cfg.augmentations}
    views = [(view.gaussian_blur.prob, view.solarization.prob) for view in cfg.augmentations]
    batch = cfg.optimizer.batch_size * cfg.devices * cfg.num_nodes
    return Recipe(batch, optimizer, rate, module.projector, module.backbone, views, *crops, jitter)


def vissl(words: list[str], epochs: int, per_epoch: int) -> Recipe:
    config: Any = convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1]
    assert config.OPTIMIZER.num_epochs == epochs and config.MODEL.TRUNK.RESNETS.ZERO_INIT_RESIDUAL
    assert config.MODEL.AMP_PARAMS.USE_AMP and config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN
    config.MACHINE.DEVICE, config.MODEL.AMP_PARAMS.USE_AMP = "cpu", False
    config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN = False
    check_config(config)
    task = PluginTask.from_config(config)
    with torch.device("meta"):
        task.base_model = task._build_model()
    task.base_loss = task._build_loss()
    task.optimizer, task.optimizer_schedulers = task._build_optimizer(), task._build_optimizer_schedulers()
    task.prepare_optimizer()
    schedule = task.optimizer_schedulers["lr"]
    steps = config.DATA.TRAIN.TRANSFORMS
    of_views = {inner["name"]: (step, inner) for step in steps for inner in step.get("transforms", ())}
    blur, solarize = (of_views[name][0]["prob"] for name in ("ImgPilGaussianBlur", "RandomSolarize"))
    (crop,) = (step for step in steps if step["name"] == "RandomResizedCrop")
    step, inner = of_views["ColorJitter"]
    (probability,) = set(step["prob"])
    jitter = (probability, *(inner[name] for name in ("brightness", "contrast", "saturation", "hue")))
    devices = config.DISTRIBUTED.NUM_NODES * config.DISTRIBUTED.NUM_PROC_PER_NODE
    return Recipe(
        config.DATA.TRAIN.BATCHSIZE_PER_REPLICA * devices,
        task.optimizer.optimizer,
        lambda step: schedule(step / (epochs * per_epoch)),
        task.base_model.heads[0].projector,
        task.base_model.trunk,
        list(zip(blur, solarize, strict=True)),
        ({3: "bicubic"}[crop["interpolation"]], crop["scale"][0]),
        jitter,
    )


def lightly(words: list[str], epochs: int, per_epoch: int) -> Recipe:
    options = schema.validate(vars(schema.parser().parse_args(words)))
    assert (options.epochs, options.backbone_option) == (epochs, {"zero_init_residual": True})
    setup = Setup(options, LIGHTLY, ["n0", "n1"])
    with torch.device("meta"):
        module: Any = setup.model("ssl_ey")
    data = {"train_dataloader": [], "num_training_batches": per_epoch, "accumulate_grad_batches": 1}
    steps = epochs * per_epoch
    module._trainer = SimpleNamespace(world_size=options.devices, estimated_stepping_batches=steps, **data)
    (optimizer,), (described,) = module.configure_optimizers()
    schedule, peak = described["scheduler"], optimizer.param_groups[0]["initial_lr"]
    transforms = [view.transform.transforms for view in setup.transform("ssl_ey").transforms]
    named = [{type(step).__name__: step for step in view} for view in transforms]
    (crop,) = {(view["RandomResizedCrop"].interpolation.value, view["RandomResizedCrop"].scale[0]) for view in named}
    jitter = named[0]["RandomApply"]
    strength = jitter.transforms[0]
    widths = tuple(round(getattr(strength, each)[1] - 1, 6) for each in ("brightness", "contrast", "saturation"))
    return Recipe(
        options.batch_size_per_device * options.devices,
        optimizer,
        lambda step: peak * schedule.scale_lr(step),
        module.projection_head,
        module.backbone,
        [(view["GaussianBlur"].prob, view["RandomSolarization"].prob) for view in named],
        crop,
        (jitter.p, *widths, strength.hue[1]),
    )


FRAMEWORKS = {"solo": solo, "vissl": vissl, "lightly": lightly}
_OPTIMIZER = "config.OPTIMIZER"
WIDE = {
    "solo": ["max_epochs=1000", "backbone.name=resnet200x2"],
    "vissl": [
        f"{_OPTIMIZER}.num_epochs=1000",
        f"{_OPTIMIZER}.param_schedulers.lr.warmup=0.01",
        "config.MODEL.TRUNK.RESNETS.WIDTH_MULTIPLIER=2",
        "config.MODEL.TRUNK.RESNETS.DEPTH=200",
        "config.MODEL.HEAD.PARAMS=[[method_head,{in_dim:4096}]]",
    ],
    "lightly": ["--epochs", "1000", "--backbone", "resnet200x2", "--lr", "0.2", "--batch-size-per-device", "256"],
}
"""1000 epochs of 2048 images at 0.2, the defaults of the files in solo-learn and VISSL, and the largest network."""
_OF_README = ("optimizer.", "scheduler.", "config.DISTRIBUTED.NUM_NODES", f"{_OPTIMIZER}.param_schedulers")


@pytest.fixture(scope="module", params=[(name, wide) for name in FRAMEWORKS for wide in (False, True)], ids=str)
def recipe(request: pytest.FixtureRequest, images: Path) -> tuple[str, bool, Recipe, int, int]:
    name, wide = request.param
    words = command("SSL-EY and VICReg", MODULES[name])
    if wide:
        words = [*(word for word in words if not word.startswith(_OF_README)), *WIDE[name]]
    epochs, per_epoch = (1000, 625) if wide else (100, 2502)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(images)
        return name, wide, FRAMEWORKS[name](words, epochs, per_epoch), epochs, per_epoch


def test_learning_rate_is_vicregs(recipe: tuple[str, bool, Recipe, int, int]) -> None:
    """0.3 for 256 images and 512 images a step; 0.2 and 2048. Ten epochs from 0, then to a thousandth of the peak."""
    name, wide, found, epochs, per_epoch = recipe
    assert found.batch == (2048 if wide else 512)
    peak, warm, total = (1.6 if wide else 0.6), 10 * per_epoch, epochs * per_epoch

    def wanted(step: int) -> float:
        if step < warm:
            return peak * step / warm
        return peak * (1001 + 999 * math.cos(math.pi * (step - warm) / (total - warm))) / 2000

    late = 0 if name == "vissl" else peak / warm  # their warm-up is shorter by a step, or starts a step later
    for step in (0, 1, warm // 2, warm - 1):
        assert found.rate(step) == pytest.approx(wanted(step), rel=1e-9, abs=1.001 * late), step
    for step in (warm, warm + per_epoch, total // 2, total - per_epoch, total - 1):
        assert found.rate(step) == pytest.approx(wanted(step), rel=1e-3 if name == "lightly" else 1e-9), step
    assert found.rate(total - 1) == pytest.approx(peak / 1000, rel=1e-3)


def test_projector_and_backbone_are_vicregs(recipe: tuple[str, bool, Recipe, int, int]) -> None:
    _, wide, found, *_ = recipe
    width, millions = (4096, 250) if wide else (2048, 23)
    shapes = {name: tuple(value.shape) for name, value in found.head.named_parameters()}
    wide_layer, norm = (8192, 8192), (8192,)
    assert shapes == {
        **{"0.weight": (8192, width), "0.bias": norm, "1.weight": norm, "1.bias": norm},
        **{"3.weight": wide_layer, "3.bias": norm, "4.weight": norm, "4.bias": norm, "6.weight": wide_layer},
    }
    assert type(found.head[6]) is nn.Linear
    assert sum(parameter.numel() for parameter in found.trunk.parameters()) // 10**6 == millions


def test_views_are_vicregs(recipe: tuple[str, bool, Recipe, int, int]) -> None:
    found = recipe[2]
    assert found.views == [(1.0, 0.0), (0.1, 0.2)]
    assert found.crop == ("bicubic", 0.08)
    assert found.jitter == pytest.approx((0.8, 0.4, 0.4, 0.2, 0.1))


def reference(parameter: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Steps of VICReg's LARS, from its description: vectors take steps of plain SGD with momentum."""
    velocity = torch.zeros_like(parameter)
    for gradient in gradients:
        if parameter.ndim > 1:
            decayed = gradient + 1e-6 * parameter
            gradient = 0.001 * parameter.norm() / decayed.norm() * decayed
        velocity = 0.9 * velocity + gradient
        parameter = parameter - lr * velocity
    return parameter


def test_steps_are_those_of_vicregs_lars(recipe: tuple[str, bool, Recipe, int, int]) -> None:
    """The gradients are so small that a clipped trust ratio would shorten the steps, and decay would show."""
    name, _, found, *_ = recipe
    generator = torch.Generator().manual_seed(0)
    groups, wanted = [], []
    for group in found.optimizer.param_groups:
        if group.get("name") in ("classifier", "online_classifier"):
            continue
        assert group["params"]
        shapes = {(8, 8) if parameter.ndim > 1 else (64,) for parameter in group["params"]}
        toys = [torch.randn(shape, generator=generator).mul_(100).requires_grad_() for shape in sorted(shapes)]
        groups.append({**group, "params": toys, "lr": 0.6})
        wanted += [(toy, [torch.randn(toy.shape, generator=generator) * 0.05 for _ in range(3)]) for toy in toys]
    before = [toy.detach().clone() for toy, _ in wanted]
    optimizer = type(found.optimizer)(groups, lr=0.6)
    for step in range(3):
        for toy, gradients in wanted:
            toy.grad = gradients[step].clone()
        optimizer.step()
    assert {toy.ndim for toy, _ in wanted} == {1, 2}
    for (toy, gradients), start in zip(wanted, before, strict=True):
        expected = reference(start, gradients, 0.6) - start
        # |g| + wd |w| in place of |g + wd w|: wd |w| / |g| is 0.002
        allowed = 1e-4 if name == "vissl" or toy.ndim == 1 else 4e-3
        assert (toy.detach() - start - expected).norm() <= allowed * expected.norm(), (name, toy.shape)


# --------------------------------------------------------------------------- the commands of the page, on 16 images


def state_of(run: Path) -> dict[str, Tensor]:
    """The backbone and the projector of a run."""
    content = torch.load(next(run.glob("*.ckpt")), weights_only=True)
    return content["state_dict"]


def check_training(state: dict[str, Tensor], projector: str) -> None:
    """Blocks started as the identity, so that after two steps of the warm-up their last norm is still near 0."""
    norms = [value for name, value in state.items() if name.startswith("backbone.") and name.endswith("bn2.weight")]
    assert len(norms) == 8 and all(value.abs().max() < 0.1 for value in norms)
    assert f"{projector}.6.weight" in state and f"{projector}.6.bias" not in state
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.slow
def test_solo_commands_run(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(main: Callable[[], None], words: list[str], *more: str) -> None:
        here = ["data.num_workers=0", "optimizer.batch_size=4", "++accelerator=cpu", "++devices=1", "strategy=auto"]
        small = ["backbone.name=resnet18", "max_epochs=1", "++limit_train_batches=2", "++limit_val_batches=1"]
        words = [word.replace("configs/solo", str(ROOT / "configs/solo")) for word in words]
        monkeypatch.setattr("sys.argv", ["main", *words, *here, *small, *more])
        main()

    widths = ("method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8")
    pretrain = command("SSL-EY and VICReg", MODULES["solo"])
    run(main_pretrain.main, pretrain, *widths, "++checkpoint.version=v")
    check_training(state_of(images / "runs" / "ssl_ey" / "v"), "projector")

    vicreg = command("SSL-EY and VICReg", MODULES["solo"], -1)
    run(main_pretrain.main, vicreg, *widths, "++checkpoint.version=v", "checkpoint.dir=runs")
    check_training(state_of(images / "runs" / "vicreg" / "v"), "projector")

    export.main(["runs/ssl_ey/v", "--to", "torchvision", "resnet50.pth"])
    trained = torch.load("resnet50.pth", weights_only=True)
    freeze = command("VICReg: evaluate", LINEAR["solo"])
    run(main_linear.main, freeze, "++checkpoint.version=freeze")
    (images / "1percent.txt").write_text("0.png\n1.png\n2.png\n3.png\n4.png\n5.png\n6.png\n7.png\n")
    data.main(command("VICReg: evaluate", "plugins.tools.data"))
    finetune = command("VICReg: evaluate", LINEAR["solo"], 1)
    run(main_linear.main, finetune, "++checkpoint.version=finetune")

    frozen, tuned = (state_of(images / "runs" / "linear" / name) for name in ("freeze", "finetune"))
    assert all(torch.equal(frozen[f"backbone.{name}"], value) for name, value in trained.items())
    assert not torch.equal(tuned["backbone.conv1.weight"], trained["conv1.weight"])
    checkpoint = torch.load(next((images / "runs" / "linear" / "finetune").glob("*.ckpt")), weights_only=True)
    rates = [group["initial_lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    assert rates == pytest.approx([0.08 * 4 / 256, 0.03 * 4 / 256])


@pytest.mark.slow
def test_lightly_commands_run(images: Path) -> None:
    here = ["--accelerator", "cpu", "--devices", "1", "--precision", "32-true", "--num-workers", "0", "--seed", "0"]
    small = ["--backbone", "resnet18", "--input-size", "32", "--batch-size-per-device", "8"]
    words = command("SSL-EY and VICReg", MODULES["lightly"])
    start = words.index("--option")
    widths = {"proj_hidden_dim=8192": "proj_hidden_dim=16", "proj_output_dim=8192": "proj_output_dim=8"}
    words = [widths.get(word, word) for word in words]
    assert words[start + 1 : start + 4] == ["proj_layers=3", "proj_hidden_dim=16", "proj_output_dim=8"]
    skip = ["--skip-knn-eval", "--skip-linear-eval", "--skip-finetune-eval"]
    lightly_main([*words, *here, *small, "--epochs", "1", *skip])
    run = images / "runs" / "lightly" / "ssl_ey"
    check_training(state_of(run), "projection_head")

    export.main([str(run), "--to", "torchvision", "resnet50.pth"])
    words = command("VICReg: evaluate", LINEAR["lightly"])
    lightly_main([*words, *here, *small, "--linear-epochs", "1"])
    result = json.loads((images / "runs" / "linear" / "ssl_ey" / "result.json").read_text())
    assert 0 <= result["linear"]["top1"] <= 1 and result["epochs"] == 0
