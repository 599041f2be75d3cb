"""The examples are what their source writes, and they train."""

import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from lightly_ext import examples
from lightly_ext.examples import generate

pytestmark = pytest.mark.lightly

FOLDER = Path(examples.__file__).parent
FIRST = "pytorch/isoloss.py"


def test_files_are_what_the_source_writes() -> None:
    there = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.glob("*/*.py")}
    assert there == generate.examples(), "run: python -m lightly_ext.examples.generate"


def quick(text: str) -> str:
    """Two batches of the thinned digits, on the CPU."""
    for old, new in (
        ("batch_size=256", "batch_size=40"),
        ("num_workers=8", "num_workers=0"),
        ("epochs = 10", "epochs = 1"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    for old, new in (
        ("sync_batchnorm=True", "sync_batchnorm=False"),
        ('"auto"', "1"),
        ('accelerator="gpu"', 'accelerator="cpu"'),
    ):
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    "path",
    [FIRST, *(pytest.param(path, marks=pytest.mark.slow) for path in sorted(generate.examples()) if path != FIRST)],
)
def test_examples_train(path: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "digits").symlink_to(digits)
    script = tmp_path / "example.py"
    script.write_text(quick((FOLDER / path).read_text()))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    start = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])  # what every example begins with
    torch.manual_seed(0)
    try:
        left = runpy.run_path(str(script), run_name="__main__")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    model = left["model"] if path.startswith("pytorch/") else left["model"].model
    student = list(model.backbone.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in student)
    assert sum(not torch.equal(a, b) for a, b in zip(student, start.parameters(), strict=True)) > 50
    counts = [int(m.num_batches_tracked) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) == {4}, "two steps of two views"
    if model.spec.teacher:
        followed = list(model.teacher_backbone.parameters())
        moved = [not torch.equal(a, b) for a, b in zip(followed, start.parameters(), strict=True)]
        behind = [not torch.equal(a, b) for a, b in zip(followed, student, strict=True)]
        assert sum(moved) > 50 and sum(behind) > 50, "the teacher moves, and stays behind"


def test_the_optimizer_of_ssl_eys_example_lowers_the_loss() -> None:
    """It grows as the fourth power of the embedding: SGD at a usual rate gave 7195, 1.8e20, NaN."""
    from sklearn.datasets import load_digits

    from lightly_ext import models

    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = models.SSLEY(convolution, input_dim=64)
    text = (FOLDER / "pytorch/ssl_ey.py").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("optimizer = "))
    space = {"torch": torch, "model": model}
    exec(line, space)
    images = torch.tensor(load_digits().images[:32] / 16, dtype=torch.float32)[:, None]
    losses = []
    for _ in range(6):
        loss = model.loss([images + 0.1 * torch.randn_like(images) for _ in range(2)])
        loss.backward()
        space["optimizer"].step()
        space["optimizer"].zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses  # false for NaN, too
