"""A toy method with a memory of images, patches, feature maps, frozen parameters and passes over the training set."""

import copy
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from lightly_ext import models
from lightly_ext.data import IndexedDataset
from lightly_ext.models.method import model_class
from plugins.clock import Clock, Stepped
from plugins.heads import MapHead
from plugins.sobel import SobelConv2d
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper
from plugins.targets import IndexedBank
from plugins.testing import tiny_backbone

pytestmark = pytest.mark.lightly

N, F, D = 12, 5, 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Terms(NamedTuple):
    loss: Tensor


class Head(MapHead):
    """A head for an image and for a stack of patches."""

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features_dim, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h if h.ndim == 2 else h.tanh().mean(1))

    def build(self, channels) -> None:
        self.local = nn.ModuleList(nn.Conv2d(count, D, 1) for count in channels)

    def project_maps(self, maps):
        return tuple(conv(m if m.ndim == 4 else m.mean(1)) for conv, m in zip(self.local, maps, strict=True))


class Prototypes(Stepped, nn.Module):
    """A predictor that starts each epoch anew, from the features of all images."""

    def __init__(self, comm) -> None:
        super().__init__()
        self.layer, self.comm = nn.Linear(D, 3, bias=False), comm
        self.seen: list[tuple[str, list[int]]] = []

    def predict(self, z: list[Tensor]) -> list[Tensor]:
        return [self.layer(view) for view in z]

    def start_epoch(self, epoch, feed):
        total = torch.zeros(3, D).to(self.layer.weight)
        for view in ("eval", "train"):
            found = []
            for index, features in feed(view=view):
                found += index.tolist()
                for number, of_view in enumerate(features):
                    total[number] += of_view.sum(0)[:D]
            self.seen.append((view, found))
        with torch.no_grad():
            self.layer.weight.copy_(self.comm.sum(total))
        return (self.layer.weight,)


class BankLoss(nn.Module):
    """The mean over the joined rows of a distance from the rows of a bank, times a learned scale."""

    def __init__(self, options, comm) -> None:
        super().__init__()
        self.clock, self.bank, self.comm = Clock(), IndexedBank(None, D), comm
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, e: Embeddings) -> Terms:
        self.clock()
        first, second, patches = e.z
        near = (first - self.bank.read(e.index)).square().sum() + (second - patches).square().sum()
        ahead = sum(p.square().sum() for p in e.p) + (second - e.target[0]).square().sum()
        for view, maps in enumerate(e.maps):
            ahead = ahead + sum((e.z[view - 1][:, :, None, None] - map_).square().sum() for map_ in maps)
        rows = self.comm.sum(torch.tensor(float(len(first))))
        if self.training:
            self.bank.write(e.index, first.detach(), self.comm)
        return Terms(self.scale * self.comm.sum(near + 0.1 * ahead) / rows)


SPEC = MethodSpec(
    name="toy",
    loss=BankLoss,
    head=lambda features_dim, options: Head(features_dim),
    predictor=lambda options, comm: Prototypes(comm),
    teacher=True,
    views=2,
    stacks=1,
    indexed=True,
    options={
        **{"proj_output_dim": Option(D, "width", low=1)},
        **{name: Option(name, "module of ResNets") for name in ("layer3", "layer4")},
    },
    paper=Paper("Toy", "this file"),
    hints=lambda options: {
        "predictor": Hints(frozen_steps=2, lr_scale=0.5, lr_constant=True),
        "projector.layer": Hints(momentum=0.0),
        "loss": Hints(lr_scale=0.1, no_decay=True),
    },
    taps=lambda options: {options["layer3"]: None, options["layer4"]: 2},
)
TAPS = {"layer3": "0", "layer4": "1"}
Toy = model_class("Toy", SPEC, __name__)


def backbone() -> nn.Module:
    """Return a backbone without batch norm, whose statistics differ between processes."""
    return nn.Sequential(nn.Conv2d(3, F, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1))


def built(num_samples: int | None = N, **options: Any) -> models.MethodModel:
    torch.manual_seed(0)
    model = Toy(backbone(), num_samples=num_samples, **{**TAPS, **options}).double()
    with torch.no_grad():
        for parameter in () if model.teacher_backbone is None else model.teacher_backbone.parameters():
            parameter.mul_(0.9)
    return model


def items(count: int = N) -> list[tuple[list[Tensor], int, str]]:
    """Two views and a stack of three patches of each image, its label and its file."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [([draw(3, 6, 6), draw(3, 6, 6), draw(3, 3, 4, 4)], i % 4, f"{i}.png") for i in range(count)]


def dataset(count: int = N) -> IndexedDataset:
    given = items(count)
    return IndexedDataset(given, evaluation=[(views[0] + 1, label, name) for views, label, name in given])


def batch(chosen: list[int]) -> tuple[list[Tensor], Tensor]:
    """The views of some images, and their positions."""
    views, _, index = next(iter(DataLoader(Subset(dataset(), chosen), batch_size=len(chosen))))
    return views, index


def optimizer_of(model: models.MethodModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.training_parameters(lr=0.05), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(model: models.MethodModel, steps: list[list[list[int]]], wrapped: nn.Module | None = None, epochs: int = 2):
    """Train in the loop of the documentation; a step has micro-batches, a micro-batch has images."""
    loader = DataLoader(dataset(), batch_size=5)
    optimizer = optimizer_of(model)
    for epoch in range(epochs):
        model.start_epoch(epoch, loader, optimizer)
        for micro_batches in steps:
            optimizer.zero_grad()
            for chosen in micro_batches:
                ((wrapped or model)(*batch(chosen)) / len(micro_batches)).backward()
            model.after_backward()
            optimizer.step()
            model.update_momentum(0.9)
    return model.state_dict(), optimizer


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or EXACT), msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------ data


def test_items_have_their_position_in_place_of_the_file() -> None:
    data = dataset()
    assert len(data) == N and data[3][1:] == (3, 3) and data[-1][2] == N - 1
    with pytest.raises(IndexError):
        data[N]
    views, labels, index = next(iter(DataLoader(data, batch_size=4)))
    assert index.dtype == torch.int64 and index.tolist() == [0, 1, 2, 3] and labels.tolist() == [0, 1, 2, 3]
    assert [view.shape for view in views] == [(4, 3, 6, 6), (4, 3, 6, 6), (4, 3, 3, 4, 4)]
    assert IndexedDataset(torch.utils.data.TensorDataset(torch.ones(2, 3)))[1][1:] == (0, 1), "without labels"
    with pytest.raises(ValueError, match="got a dict of image, label"):
        IndexedDataset([{"image": 0, "label": 1}])[0]
    with pytest.raises(ValueError, match="got 3 images for 12"):
        IndexedDataset(items(), evaluation=items(3))


def test_lightlys_data_set_and_collate_function_fit(digits: Path) -> None:
    from lightly.data import LightlyDataset
    from lightly.data.multi_view_collate import MultiViewCollate
    from torchvision import transforms as T

    images = LightlyDataset(str(digits / "train"), transform=T.Compose([T.Resize((6, 6)), T.ToTensor()]))
    data = IndexedDataset(images)
    assert data[7][1:] == (images[7][1], 7)
    paired = IndexedDataset([([view, view], label, name) for view, label, name in (images[i] for i in range(3))])
    views, _, index = MultiViewCollate()([paired[i] for i in (2, 0)])
    assert index == [2, 0]
    model = built(3, teacher=False)
    patches = torch.stack([views[0]] * 2, dim=1)
    given = [view.double() for view in (*views, patches)]
    assert torch.equal(copy.deepcopy(model).loss(given, index), model.loss(given, torch.tensor(index)))


def test_mistakes_about_positions_are_sentences() -> None:
    views, index = batch([0, 1, 2])
    model = built()
    for call, sentence in [
        (lambda: model.loss(views), "toy remembers each image and needs its position .*IndexedDataset"),
        (lambda: built(None).loss(views, index), r"toy .* needs the number .* num_samples=len\(dataset\)"),
        (lambda: model.loss(views, ["a.png"] * 3), "3 integers, got a list; wrap the data set in"),
        (lambda: model.loss(views, index.float()), r"3 integers, got torch.float32 of shape \(3,\)"),
        (lambda: model.loss(views, index[:2]), r"3 integers, got torch.int64 of shape \(2,\)"),
        (lambda: model.loss(views, index + N), "in .0, 12. for 12 training images, got 12 to 14; wrap"),
        (lambda: model.joined_loss([views], [index, index]), "an entry for each of 1 micro-batches, got 2"),
        (lambda: model.loss(views[:2], index), "toy needs 1 stack of patches per image, got none"),
        (lambda: model.loss(views[::-1], index), r"stacks of patches .* come after all other views, got shapes \[\(3"),
        (lambda: model.allocate(N + 1), "holds 12 images, but the training set has 13"),
        (lambda: model.training_parameters(), "multiplies the learning rate of (prediction_head|loss) by 0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
    with torch.no_grad():
        before = model.state_dict()
        same(before, built().state_dict(), rtol=0.0, atol=0.0)


# ------------------------------------------------------------------------------------------------ plain loops


def test_features_of_a_stack_are_the_mean_over_its_patches() -> None:
    model, (views, index) = built(), batch([0, 1])
    expected = torch.stack([model(views[2][:, patch]) for patch in range(3)]).mean(0)
    torch.testing.assert_close(model(views[2]), expected, **EXACT)
    features, embeddings = model.embed(views, index)
    assert [h.shape for h in features] == [(2, F), (2, F), (2, 3, F)]
    assert [z.shape for z in embeddings.z] == [(2, D)] * 3 and len(embeddings.target) == 2
    assert torch.equal(embeddings.index, index)


def test_the_maps_of_the_student_reach_the_loss() -> None:
    model, (views, index) = built(), batch([0, 1])
    _, embeddings = model.embed(views, index)
    assert [[map_.shape for map_ in maps] for maps in embeddings.maps] == [
        *[[(2, D, 4, 4), (2, D, 2, 2)]] * 2,
        [(2, D, 2, 2)] * 2,
    ]
    for view, found in zip(views, embeddings.maps, strict=True):
        early, late = (
            copy.deepcopy(model.backbone[: number + 1])(view.flatten(0, -4)).unflatten(0, view.shape[:-3])
            for number in range(2)
        )
        late = nn.functional.adaptive_avg_pool3d(late, (late.shape[-3], 2, 2))
        for map_, of_view, conv in zip(found, (early, late), model.projection_head.local, strict=True):
            torch.testing.assert_close(map_, conv(of_view if of_view.ndim == 4 else of_view.mean(1)), **EXACT)
    assert model(views[0]).shape == (2, F) and model.project(views[0]).shape == (2, D)
    same(copy.deepcopy(model).state_dict(), model.state_dict(), rtol=0.0, atol=0.0)
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_that_a_backbone_does_not_have_are_a_sentence() -> None:
    for make, sentence in [
        (lambda: built(layer3="layer3"), "no submodule 'layer3'; its children are 0, 1, 2"),
        (lambda: built(projection_head=nn.Linear(F, D)), "the head must be a MapHead, got a Linear"),
    ]:
        with (
            pytest.warns(UserWarning) if "MapHead" in sentence else nullcontext(),
            pytest.raises(ValueError, match=sentence),
        ):
            make()


def test_a_pass_over_the_training_set_between_micro_batches_leaves_no_maps() -> None:
    model, expected = built(), built()
    for each in (model, expected):
        each.start_epoch(0, DataLoader(dataset(), batch_size=5), optimizer_of(each))
    with pytest.raises(ValueError, match="index"):
        model.loss(batch([0, 1])[0])
    for _ in model._features([items()[0][0][0][None]]):
        pass
    assert torch.equal(model.loss(*batch([3, 4])), expected.loss(*batch([3, 4])))


def test_an_epoch_passes_over_all_images_and_drops_the_state_of_new_parameters() -> None:
    model = built()
    assert model.prediction_head.seen == []
    _, optimizer = train(model, [[[0, 1, 2]]] * 3, epochs=1)
    layer = model.prediction_head.layer.weight
    assert "momentum_buffer" in optimizer.state[layer]
    model.start_epoch(1, DataLoader(dataset(), batch_size=5, shuffle=True, drop_last=True), optimizer)
    assert layer not in optimizer.state
    seen = model.prediction_head.seen
    assert [view for view, _ in seen] == ["eval", "train"] * 2 and all(sorted(all_) == [*range(N)] for _, all_ in seen)
    views, expected = [torch.stack(rows) for rows in zip(*(views for views, _, _ in items()), strict=True)], []
    expected = torch.zeros(3, D, dtype=torch.float64)
    expected[0] = (model(views[0] + 1) + model(views[0])).sum(0)[:D]
    expected[1] = model(views[1]).sum(0)[:D]
    torch.testing.assert_close(layer.detach(), expected, **EXACT)
    assert model.training


def test_what_an_epoch_needs_is_a_sentence() -> None:
    loader = DataLoader(dataset(), batch_size=4)
    with pytest.raises(ValueError, match=r"initialises parameters anew .* start_epoch\(epoch, dataloader, optimizer\)"):
        built().start_epoch(0, loader)
    model = built()
    for given, sentence in [
        (DataLoader(IndexedDataset(items())), "without augmentation; give them: lightly_ext.data.IndexedDataset"),
        (DataLoader(dataset(), batch_size=None), "reads images by their positions, got one with batch_size=None"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model.start_epoch(0, given, optimizer_of(model))


def test_groups_follow_the_hints() -> None:
    groups = {group.pop("name"): group for group in built().training_parameters(lr=1.0)}
    assert {name: len(group.pop("params")) for name, group in groups.items()} == {
        "backbone": 2, "projection_head": 4, "prediction_head": 1, "loss": 1, "projection_head.layer": 2
    }  # fmt: skip
    assert groups == {
        "backbone": {"lr": 1.0},
        "projection_head": {"lr": 1.0},
        "prediction_head": {"lr": 0.5, "keep_lr": True},
        "loss": {"lr": 0.1, "weight_decay": 0.0},
        "projection_head.layer": {"lr": 1.0, "momentum": 0.0},
    }


def test_a_head_of_the_users_own_need_not_have_the_parts_of_the_hints() -> None:
    class Other(MapHead):
        def __init__(self) -> None:
            super().__init__()
            self.last = Head(F)

        def forward(self, h: Tensor) -> Tensor:
            return self.last(h)

        def build(self, channels) -> None:
            self.last.build(channels)

    with pytest.warns(UserWarning, match=r"projection_head has no part layer, which method toy .* momentum=0.0"):
        model = built(projection_head=Other())
    names = [group["name"] for group in model.training_parameters(lr=1.0)]
    assert names == ["backbone", "projection_head", "prediction_head", "loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(projection_head=Head(F))


def test_the_predictor_is_frozen_for_two_steps() -> None:
    model = built()
    train(model, [[[0, 1, 2]]] * 2, epochs=1)
    frozen = model.prediction_head.layer.weight.clone()
    assert model.prediction_head.layer.weight.grad is None
    fresh = built()
    fresh.start_epoch(0, DataLoader(dataset(), batch_size=5), optimizer_of(fresh))
    assert torch.equal(frozen, fresh.prediction_head.layer.weight)
    longer = built()
    train(longer, [[[0, 1, 2]]] * 3, epochs=1)
    assert not torch.equal(longer.prediction_head.layer.weight, frozen)
    assert float(longer.objective.criterion.scale.detach()) != 1.0, "a parameter of the loss is trained"


def test_a_step_of_micro_batches_counts_once() -> None:
    """The bank, the clock, the teacher and the frozen steps."""
    whole, accumulated = built(), built()
    expected, _ = train(whole, [[[0, 5, 3, 7]], [[1, 2, 8, 9]], [[4, 6, 10, 11]]])
    found, _ = train(accumulated, [[[0, 5], [3, 7]], [[1, 2], [8, 9]], [[4, 6], [10, 11]]])
    same(found, expected)
    assert int(accumulated.objective.clock.steps) == 6


def test_the_joined_loss_reads_positions() -> None:
    whole, joined = built(), built()
    (first, of_first), (second, of_second) = batch([0, 5, 3]), batch([7])
    whole.loss(*batch([0, 5, 3, 7])).backward()
    joined([first, second], [of_first, of_second]).backward()
    for (name, ours), theirs in zip(joined.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    same(joined.state_dict(), whole.state_dict())


def test_a_state_dict_gives_the_memory_its_size() -> None:
    model = built()
    train(model, [[[0, 1, 2]]])
    second = built(None)
    second.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(second.loss(*batch([1, 4])), model.loss(*batch([1, 4])))


# ------------------------------------------------------------------------------------------------ several processes


def _loop(comm, steps):
    model = built()
    return train(model, steps, DistributedDataParallel(model, find_unused_parameters=True))[0]


def _broadcast(comm, rows):
    """Return means of bank and bias: each process keeps its bank and receives the weights of rank 0."""
    model = built()
    with torch.no_grad():
        model.objective.criterion.bank.rows[:] = float(comm.rank)
        model.backbone[0].bias[:] = float(comm.rank)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True).eval()
    wrapped(*batch(rows))
    return float(model.objective.criterion.bank.rows.mean()), float(model.backbone[0].bias.mean())


@pytest.mark.ddp
def test_processes_train_as_one(ranks) -> None:
    """Two epochs with unequal rows: bank, prototypes, teacher, frozen steps."""
    expected, _ = train(built(), [[[0, 5, 3, 7, 8]], [[1, 2, 9, 4, 6]]])
    given = [([[[0, 5]], [[1, 2, 9]]],), ([[[3]], [[4]]],), ([[[7, 8]], [[6]]],)]
    for state in ranks.run(_loop, given):
        same(state, expected)


@pytest.mark.ddp
def test_the_memory_is_not_broadcast(ranks) -> None:
    assert ranks.run(_broadcast, [([0, 1],), ([2, 3],), ([4],)]) == [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)]
    assert built()._ddp_params_and_buffers_to_ignore == [
        "objective.criterion.clock.steps",
        "objective.criterion.bank.rows",
    ]


# ------------------------------------------------------------------------------------------------ Lightning


class _Killed(Exception):
    pass


def _module(**options: Any) -> nn.Module:
    from pytorch_lightning import LightningModule

    from lightly_ext.lightning.module import TrainingSteps

    torch.manual_seed(0)
    cls = type("ToyModule", (TrainingSteps, Toy, LightningModule), {})
    given = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.01, "warmup_epochs": 0, "base_tau": 0.5}
    module = cls(
        **{"batch_size_per_device": 4, "num_classes": 4, "backbone": backbone(), **TAPS, **given, **options}
    ).double()
    with torch.no_grad():
        for parameter in module.teacher_backbone.parameters():
            parameter.mul_(0.9)
    return module


def _fit(module: nn.Module, loader: Any, *, resume: Path | None = None, **options: Any) -> Any:
    from pytorch_lightning import Trainer

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    host = Trainer(**{**quiet, "max_epochs": 3, "accelerator": "cpu", "devices": 1, **options})
    host.fit(module, loader, ckpt_path=None if resume is None else str(resume), weights_only=False)
    return host


def _batches(order: list[list[int]]) -> DataLoader:
    """A loader of images whose batches are given."""
    return DataLoader(dataset(), batch_sampler=order)


WHOLE = [[0, 5, 3, 7], [1, 2, 9, 8], [4, 6, 10, 11]]


def test_lightning_allocates_starts_epochs_and_freezes() -> None:
    module = _module()
    host = _fit(module, _batches(WHOLE), max_epochs=1)
    assert module.num_samples == N and module.objective.criterion.bank.size == N
    assert [view for view, _ in module.prediction_head.seen] == ["eval", "train"]
    assert int(module.objective.clock.steps) == 3 and module.objective.clock.epoch == 0
    groups = {group["name"]: group for group in host.optimizers[0].param_groups}
    assert [*groups] == [
        *("backbone", "backbone_norms_and_biases", "projection_head", "projection_head_norms_and_biases"),
        *("prediction_head", "loss", "projection_head.layer", "projection_head.layer_norms_and_biases"),
        "online_classifier",
    ]
    base = 1.0 * 4 / 256
    assert groups["prediction_head"]["initial_lr"] == groups["prediction_head"]["lr"] == 0.5 * base
    assert groups["backbone"]["lr"] < groups["backbone"]["initial_lr"] == base
    assert groups["loss"]["weight_decay"] == 0 and groups["backbone"]["weight_decay"] == 0.01
    assert [groups[name]["momentum"] for name in ("projection_head.layer", "loss")] == [0.0, 0.9]
    fresh = _module()
    fresh.allocate(N)
    fresh.trainer = host
    fresh.start_epoch(0, _batches(WHOLE), host.optimizers[0])
    moved = module.prediction_head.layer.weight
    assert not torch.equal(moved, fresh.prediction_head.layer.weight), "the third step trains it"
    two = _module()
    _fit(two, _batches(WHOLE[:2]), max_epochs=1)
    assert torch.equal(two.prediction_head.layer.weight, fresh.prediction_head.layer.weight)


def test_adam_without_momentum() -> None:
    host = _fit(_module(optimizer="adamw", lr=0.1), _batches(WHOLE), max_epochs=1)
    betas = {group["name"]: group["betas"] for group in host.optimizers[0].param_groups}
    assert betas["projection_head.layer"] == (0.0, 0.999) and betas["backbone"] == (0.9, 0.999)


@pytest.mark.slow
def test_lightning_counts_an_accumulated_step_once() -> None:
    """The mean of equal micro-batches' losses, and the joined loss of unequal ones."""
    whole = _module()
    _fit(whole, _batches(WHOLE))
    mean, joined = _module(), _module(accumulate="joined")
    _fit(mean, _batches([part for rows in WHOLE for part in (rows[:2], rows[2:])]), accumulate_grad_batches=2)
    _fit(joined, _batches([part for rows in WHOLE for part in (rows[:1], rows[1:])]), accumulate_grad_batches=2)
    same(mean.state_dict(), whole.state_dict())
    same(joined.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("steps", "limits"), [(3, {}), (5, {}), (3, {"max_steps": 9})])
def test_a_killed_run_resumes_to_the_same_bits(steps: int, limits: dict[str, int], tmp_path: Path) -> None:
    """At the end of an epoch, and within one; the module gets the number of images only when training starts.

    With max_steps, Lightning alone ends a run too early that is resumed from a checkpoint of an epoch's end.
    """
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint

    class Kill(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == steps:
                raise _Killed

    # Lightning does not restore the position of a DataLoader within an epoch
    order = WHOLE if steps == 3 else [WHOLE[0]] * 3
    straight = _module()
    expected = _fit(straight, _batches(order), **limits)
    killed = _module()
    when = {"save_on_train_epoch_end": True} if limits else {"every_n_train_steps": steps}
    save = ModelCheckpoint(tmp_path, filename="last", **when)
    with pytest.raises(_Killed):
        _fit(killed, _batches(order), callbacks=[save, Kill()], enable_checkpointing=True, **limits)
    resumed = _module()
    host = _fit(resumed, _batches(order), resume=tmp_path / "last.ckpt", **limits)
    assert host.global_step == 9 and resumed.objective.criterion.bank.size == N
    same(resumed.state_dict(), straight.state_dict(), rtol=0.0, atol=0.0)
    ours, theirs = (each.optimizers[0].state_dict()["state"] for each in (host, expected))
    for number, state in theirs.items():
        assert all(torch.equal(value, ours[number][name]) for name, value in state.items() if value is not None)


def test_what_lightning_needs_is_a_sentence() -> None:
    from plugins.tools.command import UserError

    whole = [batch(rows) for rows in WHOLE]
    with pytest.raises(UserError, match=r"toy needs the number of training images, .* with num_samples=<number>"):
        _fit(_module(), DataLoader([(views, torch.zeros(4).long(), i) for views, i in whole], batch_size=None))
    files = dataset()
    files.__class__ = type("Files", (IndexedDataset,), {"__getitem__": lambda self, i: self.dataset[i]})
    with pytest.raises(ValueError, match=r"got a (list|tuple); wrap the data set in"):
        _fit(_module(), DataLoader(files, batch_size=4))
    shifted = lambda self, i: (*IndexedDataset.__getitem__(self, i)[:2], i + 1)  # noqa: E731
    files.__class__ = type("Shifted", (IndexedDataset,), {"__getitem__": shifted})
    with pytest.raises(ValueError, match=r"in \[0, 12\) for 12 training images, got 5 to 12; wrap"):
        _fit(_module(), DataLoader(files, batch_sampler=WHOLE[::-1]))


class _Views:
    """Two views and a stack of patches, as a transform of the benchmarks."""

    def __init__(self, input_size: int = 16, normalize: Any = None) -> None:
        self.size = input_size

    def __call__(self, image: Any) -> list[Tensor]:
        from torchvision.transforms import functional as T

        view = T.to_tensor(image.resize((self.size, self.size)))
        return [view, view.flip(-1), torch.stack([view[:, :8, :8], view[:, 8:, 8:]])]


@pytest.mark.slow
def test_the_benchmarks_train_continue_and_evaluate(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightly_ext.benchmarks import __main__ as command
    from lightly_ext.benchmarks.methods import METHODS

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored after the test
    monkeypatch.setitem(METHODS, "toy", {"model": type(_module()), "transform": _Views()})
    checkpoint = tmp_path / "toy" / "checkpoint.ckpt"

    def run(train: str, epochs: int, *more: str) -> Tensor:
        command.main(
            [
                *("--train-dir", str(digits / train), "--val-dir", str(digits / "val"), "--log-dir", str(tmp_path)),
                *("--methods", "toy", "--epochs", str(epochs), "--batch-size-per-device", "16", "--num-workers", "0"),
                *("--accelerator", "cpu", "--input-size", "16", "--seed", "0", "--backbone", "resnet8", "--knn-k", "5"),
                *("--lr", "1e-6", "--skip-linear-eval", "--skip-finetune-eval", *more),
            ]
        )
        return torch.load(checkpoint, weights_only=True)["state_dict"]["objective.criterion.bank.rows"]

    first = run("train", 1)
    second = run("train", 2, "--ckpt-path", str(checkpoint))
    assert first.shape == second.shape == (80, D) and not torch.equal(first, second)
    run("val", 0, "--ckpt-path", str(checkpoint))  # other images


def _lightning_rank(comm, order):
    place = {"LOCAL_RANK": comm.rank, "NODE_RANK": 0, "WORLD_SIZE": comm.size}
    place.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=1)  # the group is there already
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        module, ignored = _module(), []
        module.on_train_end = lambda: ignored.extend(module.trainer.strategy.model.parameters_to_ignore)
        strategy = {"strategy": "ddp_find_unused_parameters_true", "devices": comm.size}
        _fit(module, _batches(order), use_distributed_sampler=False, max_epochs=2, **strategy)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return module.state_dict(), module.prediction_head.seen, ignored


@pytest.mark.slow
@pytest.mark.ddp
def test_lightning_on_ranks_trains_as_one(ranks) -> None:
    """Unequal rows; the online classifier's loss alone is the mean of the processes'."""
    one = _module(batch_size_per_device=12)
    _fit(one, _batches([[0, 5, 3, 7, 8, 10, 11], [1, 2, 9, 4, 6, 0, 5]]), max_epochs=2)
    expected = {name: value for name, value in one.state_dict().items() if not name.startswith("online")}
    found = ranks.run(_lightning_rank, [([[0, 5], [1, 2, 9]],), ([[3, 7], [4, 6]],), ([[8, 10, 11], [0, 5]],)])
    for rank, (state, seen, ignored) in enumerate(found):
        same({name: value for name, value in state.items() if not name.startswith("online")}, expected)
        assert seen == [(view, [*range(rank, N, 3)]) for view in ("eval", "train")] * 2
        assert "objective.criterion.bank.rows" in ignored


def test_a_method_changes_the_backbone_in_place() -> None:
    """DeepCluster with the Sobel filter."""
    backbone = tiny_backbone()
    model = models.DeepCluster(backbone, num_clusters=2, sobel=True, num_samples=4)
    assert model.backbone is backbone and isinstance(backbone.conv1, SobelConv2d)
    model.loss([torch.randn(4, 3, 16, 16)], torch.arange(4)).backward()
    assert backbone.conv1.weight.grad.any()
