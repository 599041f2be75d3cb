"""Methods that see a stack of patches and no view: several processes, joined batches, evaluation, resume, mistakes."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightly_ext import lightning, models, transforms
from lightly_ext.names import CLASS_NAMES
from plugins.heads import StackHead, mlp_head
from plugins.objective import encode
from plugins.patches import patch_stack
from plugins.testing import POOL_SIZE, RankPool, tiny_backbone

pytestmark = pytest.mark.lightly

ALONE = [title for title, spec in CLASS_NAMES.items() if spec.only_stacks]
OPTIONS = {"grid": 4, "patch": 8, "stride": 4, "context_hidden_dim": 8, "proj_output_dim": 6, "norm": "per_sample"}
VARIANTS = [{"directions": 4}, {"num_negatives": 5, "context": "gru", "score": "bilinear", "directions": 2}]


def built(title: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, title)(tiny_backbone(), **{**OPTIONS, **options}).double()


def stacks(rows: int) -> torch.Tensor:
    """Stacks whose mean drifts, so that the parts of a batch differ."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.linspace(-1, 2, rows, dtype=torch.float64)[:, None, None, None, None]
    return torch.randn(rows, 16, 3, 8, 8, generator=generator, dtype=torch.float64) + drift


def two_steps(comm: Any, title: str, options: dict, stack: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights after two steps of SGD of a rank, under DistributedDataParallel if there are several."""
    model = built(title, **options)
    wrapped = model if comm is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.5, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model.before_step()
        wrapped([stack]).backward()
        optimizer.step()
        model.after_step()
    return {key: value.detach() for key, value in model.state_dict().items()}


@pytest.mark.ddp
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("title", ALONE)
def test_processes_train_as_one(title: str, options: dict, ranks: RankPool) -> None:
    """All ranks of the pool, which are the default group of DistributedDataParallel, with unequal rows."""
    counts = (3, 1, 2)
    assert len(counts) == POOL_SIZE
    stack = stacks(sum(counts))
    expected = two_steps(None, title, options, stack)
    given = [(title, options, part) for part in stack.split(list(counts))]
    for state in ranks.run(two_steps, given):
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("title", ALONE)
def test_the_joined_loss_is_that_of_the_batch(title: str) -> None:
    whole, parts = built(title), built(title)
    stack = stacks(5)
    loss = whole.loss([stack])
    loss.backward()
    joined = parts.joined_loss([[stack[:2]], [stack[2:]]])
    joined.backward()
    torch.testing.assert_close(joined, loss)
    for (key, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-8, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("title", ALONE)
def test_evaluation_sees_patches_or_the_whole_image(title: str) -> None:
    images = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    patches, image = built(title).eval(), built(title, eval_input="image").eval()
    expected = encode(patches.backbone, patch_stack(images, 8, 4))
    torch.testing.assert_close(patches(images), expected.mean(1))
    torch.testing.assert_close(patches(patch_stack(images, 8, 4)), expected.mean(1))
    torch.testing.assert_close(image(images), image.backbone(images))
    torch.testing.assert_close(patches.project(images), patches.projection_head(expected))


@pytest.mark.parametrize("kind", ["normal", "large", "small", "constant", "zero", "duplicated"])
@pytest.mark.parametrize("title", ALONE)
def test_degenerate_batches_are_finite(title: str, kind: str) -> None:
    normal = stacks(2).float()
    stack = {
        "normal": normal,
        "large": 100 * normal,
        "small": 1e-4 * normal,
        "constant": torch.full_like(normal, 3),
        "zero": torch.zeros_like(normal),
        "duplicated": normal[:1].expand_as(normal).clone(),
    }[kind]
    for options in VARIANTS:
        model = built(title, **options).float()
        loss = model.loss([stack])
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def module(title: str) -> Any:
    torch.manual_seed(0)
    options = {**OPTIONS, "num_negatives": 5, "optimizer": "adamw", "lr": 0.1}
    return getattr(lightning, title)(4, 2, tiny_backbone(), **options)


def loader() -> DataLoader:
    stack = stacks(16).float()
    batches = [([stack[rows : rows + 4]], torch.arange(4) % 2) for rows in range(0, 16, 4)]
    return DataLoader(batches, batch_size=None)


def fit(model: Any, epochs: int, folder: Path, resume: Path | None = None) -> Any:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint

    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[save], **quiet)
    trainer.fit(model, loader(), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


@pytest.mark.parametrize("title", ALONE)
def test_a_resumed_run_draws_the_same_negatives(title: str, tmp_path: Path) -> None:
    straight, resumed = module(title), module(title)
    logged = fit(straight, 2, tmp_path / "straight").callback_metrics
    assert {"train_loss", "train_information", "train_z_std", "train_online_cls_top1"} <= set(logged)
    fit(resumed, 2, tmp_path / "resumed", tmp_path / "straight" / "epoch=0.ckpt")
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("title", ALONE)
def test_mistakes_are_sentences(title: str) -> None:
    model, stack, view = built(title), stacks(2), torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    wrong = "set the option grid to the number of patches per side"
    for call, sentence in [
        (
            lambda: model.loss([view]),
            rf"needs 1 stack of patches per image, got none; use lightly_ext.*{title}Transform",
        ),
        (lambda: model.loss([view, stack]), "needs no view beside them, got 1 large view"),
        (lambda: model.loss([stack, stack]), "needs 1 stack of patches per image, got 2"),
        (lambda: model.loss([stack[:, :9]]), rf"stacks of 4 x 4 patches, got shape \(2, 9, 32\); {wrong}"),
        (
            lambda: built(title, projection_head=mlp_head(32, 8, 6)),
            "must be a plugins.heads.StackHead, such as CPCHead",
        ),
        (lambda: built(title, skip_rows=3), "skip_rows must be at most grid - 2 = 2"),
        (lambda: built(title, stride=2, grid=2), "overlap at every offset; take a larger stride"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
    own = copy.deepcopy(model.projection_head)
    assert isinstance(own, StackHead) and built(title, projection_head=own).projection_head is own


@pytest.mark.parametrize("title", ALONE)
def test_the_transform_makes_a_stack_and_warns_of_shared_colours(title: str) -> None:
    from PIL import Image

    flat, image = getattr(transforms, f"{title}Transform"), Image.new("RGB", (40, 40), (200, 60, 30))
    small = {"input_size": 20, "patch_size": 8, "patch_stride": 4}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (stack,) = flat(**small)(image)
        flat(**small, cj_prob=0.0)
    assert stack.shape == (16, 3, 8, 8)
    assert len({tuple(round(value, 4) for value in patch.mean((1, 2)).tolist()) for patch in stack}) > 10
    with pytest.warns(UserWarning, match=r"share its colours, .* by cj_prob or random_gray_scale"):
        (stack,) = flat(**small, cj_prob=0.0, random_gray_scale=0.0, min_scale=None)(image)
    assert (stack == stack[:1]).all()
    with pytest.warns(UserWarning, match=r"share its colours, .* by cj_prob or random_gray_scale"):
        flat(**small, cj_strength=0.0, random_gray_scale=0.0)
