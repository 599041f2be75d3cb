"""Images through DALI: every step of every epoch, the right labels, and an epoch that can be repeated."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps

from plugins.tools.command import UserError
from solo_ext import main_linear, main_pretrain
from solo_ext.checkpoint import find_checkpoint
from solo_ext.compat import pl
from solo_ext.config import parse_pretrain
from solo_ext.data import pretrain_images
from solo_ext.loaders import EpochSampler
from solo_ext.registry import method_class
from solo_ext.transforms import complete_views

pytestmark = [pytest.mark.solo, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
ROOT = Path(__file__).parents[2]
DALI = ("data.format=dali", "++dali.device=cpu")


class _Recorder(pl.LightningModule):
    """Record the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = {}

    def training_step(self, batch, batch_idx):
        self.batches.setdefault(self.current_epoch, []).append(batch)
        return self.weight * batch[1][0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def _train(images, epochs):
    model = _Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, enable_model_summary=False, **quiet)
    images.val = None
    trainer.fit(model, datamodule=images)
    return trainer, model.batches


def _labels(folder):
    """The label of each index, from the names of the class folders."""
    return [int(path.parent.name) for path in sorted(folder.glob("*/*.png"))]


def _same(one, other):
    return all(
        torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and all(map(torch.equal, a[1], b[1]))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow
def test_lightning_takes_every_step_of_every_epoch(compose, digits):
    """solo-learn's pipeline lost every second epoch: accuracy far below the table."""
    cfg = parse_pretrain(compose("isoloss", *DALI, "optimizer.batch_size=20"))
    trainer, epochs = _train(pretrain_images(cfg), 4)
    assert trainer.global_step == 4 * (96 // 20)
    labels = torch.tensor(_labels(digits / "train"))
    orders = []
    for epoch in range(4):
        assert len(epochs[epoch]) == 4
        for index, views, targets in epochs[epoch]:
            assert [view.shape for view in views] == [(20, 3, 16, 16)] * 2
            assert torch.equal(targets, labels[index])
            assert not torch.equal(*views)
        orders.append(torch.cat([index for index, _, _ in epochs[epoch]]).tolist())
        assert len(set(orders[-1])) == 80 and set(orders[-1]) <= set(range(96))
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.slow
def test_batches_are_those_of_the_ordinary_loader(compose):
    orders = []
    for form in ((), DALI):
        images = pretrain_images(parse_pretrain(compose("isoloss", *form)))
        images.start_epoch = 3
        loader = images.train_dataloader()
        assert len(loader) == 3
        orders.append([(index.tolist(), targets.tolist()) for index, _, targets in loader])
    assert orders[0] == orders[1]


def test_an_index_is_the_index_of_its_image(compose, digits):
    off = [f"augmentations.0.{key}" for key in ("rrc.enabled=false", "color_jitter.prob=0", "grayscale.prob=0")]
    views = []
    for form in ((), DALI):
        images = pretrain_images(parse_pretrain(compose("isoloss", *form, *off)))
        found = {}
        for index, (view, _), _ in images.train_dataloader():
            found.update(zip(index.tolist(), view, strict=True))
        views.append(found)
    assert views[0].keys() == views[1].keys()
    for index, view in views[0].items():
        torch.testing.assert_close(view, views[1][index], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_resumed_epoch_is_the_same_bytes(compose):
    _, epochs = _train(pretrain_images(parse_pretrain(compose("isoloss", *DALI, "data.num_workers=3"))), 3)
    resumed = pretrain_images(parse_pretrain(compose("isoloss", *DALI, "data.num_workers=0")))
    resumed.start_epoch = 2
    assert _same(epochs[2], list(resumed.train_dataloader()))
    assert not _same(epochs[2], epochs[1])
    other = pretrain_images(parse_pretrain(compose("isoloss", *DALI, "seed=6")))
    other.start_epoch = 2
    assert not _same(epochs[2], list(other.train_dataloader()))


@pytest.mark.slow
def test_processes_share_the_images(compose):
    images = pretrain_images(parse_pretrain(compose("isoloss", *DALI, "optimizer.batch_size=16")))
    found = []
    for rank in range(3):
        loader = images.loader(EpochSampler(images.train, 3, rank, shuffle=True, seed=5, drop_last=True))
        found.append(list(loader))
    assert [len(batches) for batches in found] == [2, 2, 2]
    assert sorted(torch.cat([batch[0] for batches in found for batch in batches]).tolist()) == list(range(96))
    # the random numbers are not the same on all: these would be views of different images that look alike
    assert len({float(batches[0][1][0].std()) for batches in found}) == 3


# what a view does


@pytest.fixture
def view(tmp_path):
    """view(images, **sections) → the images ``[N, 3, H, W]`` as one view of DALI leaves them, in [0, 255]."""

    def through(images, *, size=8, device="cpu", **sections):
        (tmp_path / "a").mkdir(exist_ok=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "a" / f"{index:03d}.png")
        entry = {"rrc": {"enabled": False}, "crop_size": size, "num_crops": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}
        data = {"dataset": "custom", "train_path": str(tmp_path), "val_path": None, "format": "dali", "num_workers": 1}
        cfg = {
            "data": {**data, "no_labels": False, "fraction": -1},
            **{"seed": 0, "devices": 1, "debug_augmentations": False, "dali": {"device": device}},
            "optimizer": {"batch_size": len(images)},
            "augmentations": complete_views([{**entry, **sections}]),
        }
        ((index, (found,), _),) = pretrain_images(OmegaConf.create(cfg)).train_dataloader()
        return found[index.argsort()] * 255

    return through


def _plain(colour, side=8):
    return np.broadcast_to(np.array(colour, np.uint8), (side, side, 3)).copy()


_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


@pytest.mark.sample("order")
@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, (200, 100, 50)),
        ({"solarization": {"prob": 1.0}}, (55, 100, 50)),
        ({"grayscale": {"prob": 1.0}}, (124, 124, 124)),  # 0.299 R + 0.587 G + 0.114 B
        ({"gaussian_blur": {"prob": 1.0}}, (200, 100, 50)),
        ({"color_jitter": {"prob": 1.0, **_JITTER}}, (200, 100, 50)),
        ({"solarization": {"prob": 1.0}, "grayscale": {"prob": 1.0}}, (124, 124, 124)),  # grey first
    ],
    ids=["nothing", "solarise", "grey", "blur", "no jitter", "order"],
)
def test_a_plain_colour_becomes(section, expected, view):
    found = view([_plain((200, 100, 50))], **section)[0]
    wanted = torch.tensor(expected, dtype=torch.float32)[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1.01)


def test_statistics_of_the_dataset_are_used(compose, digits):
    off = [f"augmentations.0.{key}" for key in ("rrc.enabled=false", "color_jitter.prob=0", "grayscale.prob=0")]
    images = pretrain_images(parse_pretrain(compose("isoloss", *DALI, *off)))
    views = torch.cat([views[0] for _, views, _ in images.train_dataloader()])
    pixels = np.stack([np.asarray(Image.open(path)) for path in (digits / "train").glob("*/*.png")]) / 255
    wanted = (pixels.mean((0, 1, 2)) - (0.2692, 0.2715, 0.2712)) / (0.1796, 0.1785, 0.1798)
    assert views.mean((0, 2, 3)).numpy() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.sample("0.3")
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_a_view_is_changed_as_often_as_said(prob, view):
    solarised = view([_plain((200, 100, 50))] * 200, solarization={"prob": prob})[:, 0, 0, 0] < 100
    assert abs(solarised.float().mean() - prob) <= 4 * (prob * (1 - prob) / 200) ** 0.5


def test_brightness_stays_in_its_range(view):
    bright = view([_plain((100, 100, 100))] * 200, color_jitter={**_JITTER, "prob": 1.0, "brightness": 0.4})[:, 0, 0, 0]
    assert 59 <= bright.min() < 65 and 135 < bright.max() <= 141


def test_a_flip_mirrors(view):
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    found = view([image], horizontal_flip={"prob": 1.0})[0]
    torch.testing.assert_close(found, torch.tensor(image[:, ::-1].copy()).permute(2, 0, 1).float(), rtol=0, atol=1e-3)


def test_equalisation_is_that_of_pil(view):
    image = np.random.default_rng(0).normal(120, 25, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    found = view([image], size=64, equalization={"prob": 1.0})[0]
    wanted = torch.tensor(np.array(ImageOps.equalize(Image.fromarray(image)))).permute(2, 0, 1).float()
    assert (wanted - torch.tensor(image).permute(2, 0, 1)).abs().mean() > 20
    torch.testing.assert_close(found, wanted, rtol=0, atol=6)  # the two round differently


def test_without_a_random_crop_the_centre_is_taken(view):
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 255
    assert view([image]).min() > 250


def test_views_of_several_sizes(compose, digits):
    small = compose("isoloss").augmentations[0]
    cfg = compose("isoloss", *DALI, "method=swav", "method_kwargs=null")
    cfg.augmentations = [small, {**small, "crop_size": 8, "num_crops": 3}]
    images = pretrain_images(parse_pretrain(cfg))
    for _, views, _ in images.train_dataloader():
        assert [view.shape[-1] for view in views] == [16, 16, 8, 8, 8]
        assert not torch.equal(views[2], views[3])


# which images


def test_a_fraction_has_its_own_indexes(compose):
    orders = []
    for form in ((), DALI):
        images = pretrain_images(
            parse_pretrain(compose("isoloss", *form, "++data.fraction=0.5", "optimizer.batch_size=8"))
        )
        batches = [(index, targets) for index, _, targets in images.train_dataloader()]
        assert len(batches) == 6 and sorted(torch.cat([b[0] for b in batches]).tolist()) == list(range(48))
        orders.append([(index.tolist(), targets.tolist()) for index, targets in batches])
    assert orders[0] == orders[1]


def test_images_without_labels(compose, digits, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (digits / "train").glob("*/*.png"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    (flat / "notes.txt").write_text("no image")
    more = ("data.dataset=custom", f"data.train_path={flat}", "++data.no_labels=True")
    images = pretrain_images(parse_pretrain(compose("isoloss", *DALI, *more)))
    assert images.val is None
    for index, _, targets in images.train_dataloader():
        assert torch.equal(targets, torch.full_like(index, -1))


def test_a_broken_image_is_named(compose, digits, tmp_path, monkeypatch):
    """DALI reports that an image is broken, but not which. Its decoder is replaced here, because it may crash."""

    def refuse(*_):
        raise RuntimeError("nvImageCodec failure")

    folder = tmp_path / "broken"
    shutil.copytree(digits / "train", folder)
    (folder / "7" / "oops.png").write_bytes(b"no image")
    cfg = parse_pretrain(compose("isoloss", *DALI, f"data.train_path={folder}", "optimizer.batch_size=97"))
    loader = pretrain_images(cfg).train_dataloader()
    monkeypatch.setattr(loader, "_start", refuse)
    with pytest.raises(UserError, match=r"7/oops.png cannot be read as an image"):
        list(loader)


# the commands


def _command(digits, out, name, *more):
    return [
        *("prog", "--config-path", str(ROOT / "configs" / "solo" / "digits"), "--config-name", name, *DALI),
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", f"++checkpoint.dir={out}"),
        *("++check_val_every_n_epoch=1", "++checkpoint.frequency=1", *more),
    ]


@pytest.mark.slow
def test_a_run_with_dali_resumes_to_the_same_weights_and_is_evaluated(digits, tmp_path, monkeypatch):
    states = []
    for version in ("whole", "resumed"):
        first = tmp_path / "isoloss" / "whole" / "isoloss-digits-whole-ep=0.ckpt"
        more = (f"++resume_from_checkpoint='{first}'",) if version == "resumed" else ("++checkpoint.keep_prev=true",)
        more = (*more, "max_epochs=3", f"++checkpoint.version={version}", "optimizer.batch_size=20")
        monkeypatch.setattr(sys, "argv", _command(digits, tmp_path, "isoloss", *more))
        main_pretrain.main()
        states.append(torch.load(find_checkpoint(tmp_path / "isoloss" / version), weights_only=True))
    assert [state["global_step"] for state in states] == [3 * (96 // 20)] * 2
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    assert states[0]["state_dict"]["backbone.conv1.weight"].isfinite().all()

    more = (f"pretrained_feature_extractor={tmp_path / 'isoloss' / 'whole'}", "max_epochs=2", "++checkpoint.version=w")
    monkeypatch.setattr(sys, "argv", _command(digits, tmp_path, "linear", *more, "optimizer.batch_size=20"))
    main_linear.main()
    state = torch.load(find_checkpoint(tmp_path / "linear" / "w"), weights_only=True)
    assert state["global_step"] == 2 * 5  # the last, smaller batch is trained on
    assert json.loads((tmp_path / "linear" / "w" / "linear.json").read_text())["train_images"] == 96


@pytest.mark.slow
def test_a_method_with_a_memory_of_the_images(compose):
    """DeepCluster v2 reads the number of images, and writes to the indexes of a batch."""
    options = "{proj_hidden_dim: 32, proj_output_dim: 16, temperature: 0.1, num_prototypes: [5, 5, 5], kmeans_iters: 3}"
    more = ("method=deepclusterv2", "++dali.encode_indexes_into_labels=true")
    cfg = parse_pretrain(compose("byol", *DALI, *more, "++max_epochs=2", "~method_kwargs", f"+method_kwargs={options}"))
    model = method_class(cfg)(cfg)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=pretrain_images(cfg))
    assert (trainer.global_step, model.dataset_size) == (6, 96)
    assert sorted(model.local_memory_index.tolist()) == list(range(96))
    assert torch.isfinite(trainer.callback_metrics["train_deepcluster_loss_epoch"])  # NaN in the first, by design


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sela", "deepcluster", "deepcluster_v2"])
def test_a_pass_over_the_training_set_labels_the_images_that_dali_reads(method, compose, tiny):
    """The pass reads the image folder, whose positions are those of DALI's batches."""
    found = []
    for form in ((), DALI):
        cfg = parse_pretrain(compose(method, tiny, *form, "++max_epochs=1", "++limit_train_batches=1"))
        torch.manual_seed(0)
        model = method_class(cfg)(cfg)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, limit_val_batches=0, **quiet)
        trainer.fit(model, datamodule=pretrain_images(cfg))
        found.append(model.objective.criterion.table.labels.clone())
    assert found[0].shape[1] == 96 and found[0].min() >= 0
    assert torch.equal(*found)


# refusals


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("data.dataset=cifar10",), "data.format=dali needs image files, but cifar10 has none"),
        (("++dali.device=tpu",), "dali.device must be cpu or gpu, got 'tpu'"),
        (("++dali.devise=cpu",), "dali has no entry 'devise'; known entries: device"),
        (("++dali=cpu",), "dali must be a mapping"),
    ],
)
def test_a_mistake_is_one_sentence(more, sentence, compose):
    with pytest.raises(UserError, match=sentence):
        parse_pretrain(compose("isoloss", *DALI, *more))


def test_no_gpu_is_one_sentence(compose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"dali.device is gpu, but this machine has no GPU; add \+\+dali.device=cpu"):
        parse_pretrain(compose("isoloss", "data.format=dali", "++dali.device=gpu"))
    assert parse_pretrain(compose("isoloss", "data.format=dali")).dali.device == "cpu"


def test_a_missing_dali_is_one_sentence(compose, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r'needs NVIDIA DALI .*pip install "ssl-plugins\[dali\]"'):
        parse_pretrain(compose("isoloss", *DALI))


# on a GPU


def _needs_gpu():
    if not torch.cuda.is_available():
        pytest.skip("NOT TESTED: DALI on a GPU, since there is none")


@pytest.mark.gpu
def test_images_are_decoded_on_the_gpu(compose, digits):
    _needs_gpu()
    gpu = parse_pretrain(compose("isoloss", "data.format=dali", "++dali.device=gpu", "accelerator=gpu"))
    images = pretrain_images(gpu)
    images.start_epoch = 1
    labels = torch.tensor(_labels(digits / "train"))
    first, again = list(images.train_dataloader()), list(images.train_dataloader())
    assert len(first) == 3
    for batch, repeated in zip(first, again, strict=True):
        index, views, targets = batch
        assert all(view.is_cuda and view.shape == (32, 3, 16, 16) for view in views)
        assert torch.equal(targets.cpu(), labels[index.cpu()])
        for one, other in zip(views, repeated[1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-2)


@pytest.mark.gpu
def test_a_plain_colour_on_the_gpu(view):
    _needs_gpu()
    section = {"solarization": {"prob": 1.0}, "gaussian_blur": {"prob": 1.0}}
    found = view([_plain((200, 100, 50))], device="gpu", **section)[0].cpu()
    torch.testing.assert_close(found.mean((1, 2)), torch.tensor([55.0, 100.0, 50.0]), rtol=0, atol=1.01)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_run_with_dali_on_the_gpu(digits, tmp_path, monkeypatch):
    _needs_gpu()
    more = ("++dali.device=gpu", "accelerator=gpu", "max_epochs=3", "++checkpoint.version=v", "optimizer.batch_size=20")
    monkeypatch.setattr(sys, "argv", _command(digits, tmp_path, "isoloss", *more))
    main_pretrain.main()
    state = torch.load(find_checkpoint(tmp_path / "isoloss" / "v"), weights_only=True)
    assert state["global_step"] == 3 * (96 // 20)
