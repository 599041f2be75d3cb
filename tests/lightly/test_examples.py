"""The example scripts train every method, and so do the model classes with their defaults."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lightly_ext import examples, models
from lightly_ext.examples import common
from lightly_ext.loss import SSLEYLoss
from lightly_ext.models.modules import SSLEYProjectionHead
from lightly_ext.names import CLASS_NAMES
from plugins.methods import METHODS
from plugins.testing import OF_VIEWS
from plugins.tools.command import UserError

pytestmark = pytest.mark.lightly

FOLDER = Path(examples.__file__).parent
SCRIPTS = ("plain_pytorch", "lightning_module", "lightning_distributed")
NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}


def accuracies(printed: str) -> tuple[float, float]:
    """The kNN accuracy before and after the training, as a script prints it."""
    before, after = re.findall(r"^kNN (?:un)?trained: ([\d.]+)$", printed, re.MULTILINE)
    return float(before), float(after)


@pytest.fixture(scope="module")
def few_batches(digits: Path) -> DataLoader:
    """One epoch of augmented batches of the thinned digits."""
    return DataLoader(list(common.views(digits / "train")), batch_size=None)


@pytest.mark.usefixtures("narrow_examples")
@pytest.mark.sample("isoloss-*", "dissl-plain_pytorch")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("method", OF_VIEWS)
def test_every_script_trains_every_method(
    method: str, script: str, digits: Path, few_batches: DataLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[nn.Module] = []
    build: Callable[[str], nn.Module] = common.build
    monkeypatch.setattr(common, "build", lambda method: built.append(build(method)) or built[0])
    monkeypatch.setattr(common, "views", lambda folder: few_batches)
    monkeypatch.setattr(common, "knn", lambda model, data: 0.0)
    more = ["--devices", "1"] if script.endswith("distributed") else []
    torch.manual_seed(0)
    start = build(method)
    module = importlib.import_module(f"lightly_ext.examples.{script}")
    module.main(["--method", method, "--steps", "2", "--data", str(digits), "--seed", "0", *more])
    (model,) = built
    moved = [not torch.equal(a, b) for a, b in zip(model.backbone.parameters(), start.backbone.parameters())]  # noqa: B905
    assert all(parameter.isfinite().all() for parameter in model.parameters()) and all(moved)
    counts = [int(m.num_batches_tracked) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) == {4}, "two steps of two views"
    if METHODS[method].teacher:
        teacher, student = model.teacher_backbone[0].weight, model.backbone[0].weight
        assert not torch.equal(teacher, start.backbone[0].weight), "the teacher moves"
        assert not torch.equal(teacher, student), "the teacher stays behind"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_method_is_one_line_of_a_script(script: str) -> None:
    text = (FOLDER / f"{script}.py").read_text()
    assert text.count('METHOD = "isoloss"\n') == 1 and "isoloss" not in text.replace('METHOD = "isoloss"\n', "")
    assert importlib.util.find_spec(script) is None, "run as a script, its folder comes first in the search path"


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_print_once(digits: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "lightning_distributed.py"), "--steps", "1", "--data", str(digits)],
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    accuracies(done.stdout)


def test_mistakes_are_one_sentence(digits: Path, tmp_path: Path) -> None:
    main = importlib.import_module("lightly_ext.examples.plain_pytorch").main
    (tmp_path / "train" / "0").mkdir(parents=True)
    few = tmp_path / "few"
    for split in ("train", "val"):
        (few / split / "0").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(few / split / "0" / "0.png")
    other = tmp_path / "other"
    shutil.copytree(few / "train", other / "train")
    shutil.copytree(few / "train" / "0", other / "val" / "1")
    for given, sentence in (
        (["--method", "isolos"], "--method: unknown method 'isolos'; did you mean isoloss?"),
        (["--method", "pirl"], "--method: the examples do not train pirl, which needs the indexes of the images and"),
        (["--method", "?"], "--method: unknown method '?'; choose from amdim, barlow_twins, byol, "),
        (["--steps", "0"], "argument --steps: must be above 0, got 0; see --help"),
        (["--data", str(tmp_path)], f"--data must be a folder with train/ and val/, but {tmp_path} has no folder val"),
        (
            ["--data", str(tmp_path / "other")],
            f"{tmp_path / 'other' / 'train'} and {tmp_path / 'other' / 'val'} have diff",
        ),
        (["--data", str(few)], f"--data: a batch needs 64 training images, but {few / 'train'} contains 1"),
    ):
        with pytest.raises(UserError) as error:
            main(given)
        assert str(error.value).startswith(sentence)


def _small_backbone() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.BatchNorm2d(64))
    for name, module in {"layer3": nn.ReLU(), "layer4": nn.Identity(), "avgpool": nn.AdaptiveAvgPool2d(1)}.items():
        network.add_module(name, module)
    return network


@pytest.fixture(scope="module")
def simclr_views(digits: Path) -> list[list[torch.Tensor]]:
    transform = SimCLRTransform(input_size=16)
    images = [Image.open(path).convert("RGB") for path in sorted((digits / "train").glob("*/*.png"))[::8]]
    torch.manual_seed(0)
    return [[torch.stack(view) for view in zip(*map(transform, images), strict=True)] for _ in range(2)]


@pytest.mark.sample("isoloss", "ssl_ey")
@pytest.mark.parametrize("method", OF_VIEWS)
def test_defaults_are_stable_with_lightlys_usual_sgd(method: str, simclr_views: list[list[torch.Tensor]]) -> None:
    """Model class, stock transform, learning rate 0.06, three steps: SSL-EY gave 2.4e4, 1.2e25, NaN."""
    torch.manual_seed(0)
    model = vars(models)[NAMES[method]](_small_backbone(), input_dim=64)
    model.start_epoch(0)
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.06)
    first = last = None
    for step in range(3):
        loss = model.loss(simclr_views[step % 2])
        loss.backward()
        model.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_momentum(0.99)
        last = loss.item()
        first = last if first is None else first
    assert abs(last) < 10 * abs(first) + 10  # false for NaN, too
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("width", [64, 1024])
def test_ssl_eys_head_and_loss_are_stable_at_any_width(width: int, simclr_views: list[list[torch.Tensor]]) -> None:
    torch.manual_seed(0)
    backbone, head, criterion = _small_backbone(), SSLEYProjectionHead(64, width, width), SSLEYLoss()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    losses = []
    for step in range(8):
        loss = criterion(*(head(backbone(view).flatten(1)) for view in simclr_views[step % 2]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 100, losses
