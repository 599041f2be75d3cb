"""Methods with memory, stacks of patches, feature maps, frozen and re-initialised parts: a method of this file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import open_dict
from torch import Tensor, nn

from plugins.clock import Clock, Stepped
from plugins.heads import MapHead
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper
from plugins.targets import IndexedBank
from plugins.testing import POOL_SIZE, tiny_backbone
from plugins.tools.command import UserError
from solo_ext import registry
from solo_ext.architectures import ARCHITECTURES
from solo_ext.config import parse_pretrain

pytestmark = pytest.mark.solo
D, PATCHES = 4, 4
AUGMENTATIONS = (
    "augmentations=[{rrc:{enabled:true,crop_min_scale:0.2,crop_max_scale:1.0},crop_size:16,num_crops:1},"
    "{rrc:{enabled:true,crop_min_scale:0.6,crop_max_scale:1.0},jigsaw:{side:20,grid:2},photometric:{prob:0.5},"
    "crop_size:8,num_crops:1}]"
)
OVERRIDES = ("method=toy", AUGMENTATIONS, "knn_eval.enabled=False", "optimizer.lr=0.5", "optimizer.name=sgd")


class Terms(NamedTuple):
    loss: Tensor


class Labeller(Stepped, nn.Module):
    """A predictor that is frozen for two steps, and starts each epoch with the mean of all training features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 3)
        self.seen: list[int] = []

    def predict(self, z: list[Tensor]) -> list[Tensor]:
        return [self.layer(view) for view in z]

    def start_epoch(self, epoch, feed):
        self.seen, sums = [], torch.zeros(())
        for view in ("eval", "train"):
            for index, (features,) in feed(view=view):
                self.seen += index.tolist()
                sums = sums + features.sum()
        with torch.no_grad():
            self.layer.bias.fill_(torch.tanh(sums))
        return [self.layer.bias] if epoch else []


def distance(z: Tensor, map_: Tensor) -> Tensor:
    """Squared distance of a view from the places of a map of the other view."""
    return (z[:, :, None, None] - map_).square().flatten(1).mean(1) / 10


class Memory(nn.Module):
    """Squared distance of both views from the rows of a bank, which the image moves."""

    def __init__(self, options, comm) -> None:
        super().__init__()
        self.clock, self.bank, self.comm = Clock(), IndexedBank(None, D), comm
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, e: Embeddings) -> Terms:
        self.clock()
        rows = self.bank.read(e.index)
        squares = [(self.scale * z - rows).square().sum(1) for z in e.z] + [p.square().sum(1) for p in e.p]
        squares += [distance(e.z[1 - view], map_) for view, maps in enumerate(e.maps) for map_ in maps]
        sums = torch.stack([torch.stack(squares).sum(), torch.tensor(float(len(rows)))])
        total, count = self.comm.sum(sums)
        if self.training:
            self.bank.write(e.index, e.z[0].detach(), self.comm)
        return Terms(total / count)


class Head(MapHead):
    """A linear layer of the features, after the mean over patches, and one of each map."""

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features_dim, D)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.mean(1) if features.ndim == 3 else features)

    def build(self, channels) -> None:
        self.local = nn.ModuleList(nn.Conv2d(count, D, 1) for count in channels)

    def project_maps(self, maps):
        return tuple(conv(m.mean(1) if m.ndim == 5 else m) for conv, m in zip(self.local, maps, strict=True))


SPEC = MethodSpec(
    name="toy",
    loss=Memory,
    head=lambda features_dim, options: Head(features_dim),
    predictor=lambda options, comm: Labeller(),
    teacher=True,
    views=1,
    stacks=1,
    indexed=True,
    options={"proj_output_dim": Option(D, "width", low=1), "proj_hidden_dim": Option(D, "unused", low=1)},
    paper=Paper("Toy", "this file"),
    hints=lambda options: {
        "predictor": Hints(frozen_steps=2, momentum=0.0),
        "loss": Hints(lr_scale=0.5, no_decay=True),
    },
    taps=lambda options: {"conv1": None, "relu": 2},
)


TOY = registry._adapt(SPEC)


def with_toy() -> dict[str, type]:
    return {**registry.plugin_methods(), "toy": TOY}


@pytest.fixture
def toy(compose: Callable, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """toy(*overrides) → a configuration of the toy method."""
    classes = with_toy()
    monkeypatch.setattr(registry, "plugin_methods", lambda: classes)
    return lambda *overrides: plain(compose("byol", tiny, *OVERRIDES, *overrides))


def plain(cfg: Any) -> Any:
    """Remove the options of the method and of the optimiser that the configuration of BYOL has."""
    with open_dict(cfg):
        cfg.method_kwargs = {} if cfg.method == "toy" else cfg.get("method_kwargs") or {}
        cfg.optimizer.kwargs = {}
    return cfg


def built(cfg: Any) -> nn.Module:
    torch.manual_seed(0)
    cfg = parse_pretrain(cfg)
    return registry.method_class(cfg)(cfg)


def test_the_stack_is_a_view_that_only_the_method_sees(toy):
    model = built(toy())
    assert (model.num_large_crops, model.num_small_crops) == (1, 0)
    model.log_dict = lambda *args, **kwargs: None
    model.objective.allocate(8)
    model.backbone.eval()  # patches and micro-batches have batch statistics of their own
    images, stack = torch.randn(5, 3, 16, 16), torch.randn(5, PATCHES, 3, 8, 8)
    rows = model.objective.criterion.bank.rows.clone()
    loss = model.training_step([torch.arange(5), [images, stack], torch.zeros(5, dtype=torch.int64)], 0)
    features = torch.stack([model.backbone(stack[:, patch]) for patch in range(PATCHES)]).mean(0)
    z = [model.projector(model.backbone(images)), model.projector(features)]
    p = model.predictor.predict(z)
    expected = sum(((view - rows[:5]) ** 2).sum() for view in z) + sum((view**2).sum() for view in p)
    for other, view in zip(z[::-1], (images[:, None], stack), strict=True):
        early = torch.stack([model.backbone.conv1(patch) for patch in view.unbind(1)], 1)
        late = torch.stack([model.backbone.bn1(patch).relu() for patch in early.unbind(1)], 1)
        late = nn.functional.adaptive_avg_pool2d(late.mean(1), 2)
        for conv, map_ in zip(model.projector.local, (early.mean(1), late), strict=True):
            expected = expected + distance(other, conv(map_)).sum()
    classes = nn.functional.cross_entropy(model.classifier(model.backbone(images).detach()), torch.zeros(5).long())
    torch.testing.assert_close(loss, expected / 5 + classes)


def test_a_sharded_strategy_is_refused_for_a_method_with_maps(toy, monkeypatch):
    class Trainer:
        strategy, global_step, estimated_stepping_batches = type("FSDPStrategy", (), {})(), 0, 1

    model = built(toy())
    monkeypatch.setattr(model.objective, "allocate", lambda size: None)
    monkeypatch.setattr("solo_ext.method.training_set_size", lambda trainer: 8)
    monkeypatch.setattr("solo_ext.method.set_clock", lambda trainer, clock: None)
    monkeypatch.setattr(type(model), "trainer", Trainer)
    with pytest.raises(
        UserError, match=r"method toy, which .* maps, needs one device or the strategy ddp, got FSDPStra"
    ):
        model.on_train_start()


def test_the_optimiser_has_the_groups_that_the_hints_name(toy):
    model = built(toy())
    groups = {group["name"]: group for group in model.learnable_params}
    assert groups["predictor"]["momentum"] == 0.0 and "weight_decay" not in groups["predictor"]
    assert groups["loss"]["weight_decay"] == 0.0 and groups["loss"]["lr"] == model.lr / 2
    assert groups["loss"]["params"] == [model.objective.criterion.scale]
    adam = built(toy("optimizer.name=adamw"))
    assert {group["name"]: group for group in adam.learnable_params}["predictor"]["betas"] == (0.0, 0.999)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=simsiam", "++method_kwargs.log_eigvals=True"], "needs no stacks of patches"),
        (["augmentations=[{rrc:{enabled:true,crop_min_scale:0.2,crop_max_scale:1.0},crop_size:16,num_crops:1}]"],
         "needs 1 stack of patches"),
        (["augmentations.1.jigsaw.side=21"], "jigsaw.side must be a multiple of grid"),
        (["augmentations.1.crop_size=11"], "crop_size at most side / grid"),
        (["++augmentations.1.rotation=True"], "jigsaw and rotation exclude each other"),
        (["augmentations.1.rrc.enabled=False"], "rrc.enabled must be true"),
        (["++augmentations.0.rotation=True"], "needs 1 stack of patches per image, got 2"),
        (["method=vicreg", "~method_kwargs"], "solo-learn's method vicreg"),
    ],
)  # fmt: skip
def test_what_no_stack_can_be_made_of_is_refused(overrides, message, toy):
    with pytest.raises(UserError, match=message):
        built(toy(*overrides))


def test_the_memory_is_not_broadcast(toy):
    model = built(toy())
    assert "objective.criterion.bank.rows" in model._ddp_params_and_buffers_to_ignore
    assert not [name for name in model._ddp_params_and_buffers_to_ignore if name not in dict(model.named_buffers())]


def fitted(cfg: Any, *, stop: int | None = None, resume: Path | None = None) -> nn.Module:
    """Train as main_pretrain does; return the model."""
    from solo_ext import logs
    from solo_ext.compat import pl
    from solo_ext.main_pretrain import pretrain

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            found.append(module)
            if trainer.global_step == stop:
                raise KeyboardInterrupt

    found, usual = [], logs.callbacks
    logs.callbacks = lambda cfg: [*usual(cfg), Keep()]
    try:
        pretrain(cfg)
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        logs.callbacks = usual
    return found[-1]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(toy, tmp_path):
    """Three epochs of three steps: bank, frozen layer, new layer, scale and teacher; the pass sees each image once."""
    common = ("++max_epochs=3", "++checkpoint.frequency=1", "++checkpoint.keep_prev=True", "optimizer.batch_size=30")
    whole = fitted(toy(*common, "++checkpoint.version=a"))
    fitted(toy(*common, "++checkpoint.version=b"), stop=7)
    (checkpoint,) = (tmp_path / "runs" / "toy" / "b").glob("*ep=1.ckpt")
    resumed = fitted(toy(*common, "++checkpoint.version=c", f"++resume_from_checkpoint='{checkpoint}'"))
    assert sorted(whole.predictor.seen) == sorted([*range(96)] * 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    bank = whole.objective.criterion.bank
    assert bank.size == 96 and not torch.equal(bank.rows, IndexedBank(96, D).rows)
    assert int(whole.objective.clock.steps) == 9
    assert any(
        not torch.equal(one, other)
        for one, other in zip(whole.momentum_projector.parameters(), whole.projector.parameters(), strict=True)
    )


def _on_ranks(comm: Any, rank: int, size: int, digits: str, out: str, overrides: list[str]) -> dict[str, Tensor]:
    import os

    from hydra import compose, initialize_config_dir

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    place.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=1, TORCHELASTIC_RUN_ID="test")  # the group is there already
    before, usual = dict(os.environ), registry.plugin_methods
    os.environ.update({name: str(value) for name, value in place.items()})
    ARCHITECTURES["tiny"] = tiny_backbone
    classes = with_toy()
    registry.plugin_methods = lambda: classes
    try:
        folder = Path(__file__).parents[2] / "configs" / "solo" / "digits"
        with initialize_config_dir(str(folder), version_base="1.2"):
            cfg = compose("byol", [f"data.train_path={digits}/train", f"data.val_path={digits}/val", *overrides,
                                   f"++devices={size}", f"++checkpoint.dir={out}"])  # fmt: skip
        model = fitted(plain(cfg))
        return {"seen": torch.tensor(model.predictor.seen), **{k: v.clone() for k, v in model.state_dict().items()}}
    finally:
        registry.plugin_methods = usual
        ARCHITECTURES.pop("tiny")
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_a_checkpoint_of_another_training_set_is_refused(toy, tmp_path, digits):
    common = ("++max_epochs=1", "++checkpoint.frequency=1", "optimizer.batch_size=30", "++checkpoint.version=a")
    fitted(toy(*common))
    (checkpoint,) = (tmp_path / "runs" / "toy" / "a").glob("*ep=0.ckpt")
    smaller = f"data.train_path={digits / 'val'}"
    with pytest.raises(UserError, match="memory bank holds 96 images, but the training set has 40"):
        fitted(toy(*common, smaller, "++max_epochs=2", f"++resume_from_checkpoint='{checkpoint}'"))


@pytest.mark.slow
@pytest.mark.ddp
def test_processes_share_the_memory_and_the_pass(ranks, digits, tmp_path):
    overrides = [*OVERRIDES, "backbone.name=tiny", "++max_epochs=1", "++limit_val_batches=0", "++strategy=ddp",
                 "optimizer.batch_size=8", "++limit_train_batches=3"]  # fmt: skip
    given = [(rank, POOL_SIZE, str(digits), str(tmp_path), overrides) for rank in range(POOL_SIZE)]
    found = ranks.run(_on_ranks, given)
    seen = [state.pop("seen") for state in found]
    assert sorted(torch.cat(seen).tolist()) == sorted([*range(96)] * 2)
    for name, value in found[0].items():
        if not name.endswith(("running_mean", "running_var")):
            assert all(torch.equal(value, other[name]) for other in found[1:]), name
    written = (found[0]["objective.criterion.bank.rows"] != IndexedBank(96, D).rows).any(1).sum()
    assert written == 3 * POOL_SIZE * 8


@pytest.mark.parametrize("rows", [(2, 2), (3, 1)])
def test_micro_batches_are_joined_with_their_index_and_their_stack(rows, toy, monkeypatch):
    class Trainer:
        accumulate_grad_batches, precision_plugin = 2, None

    model = built(toy()).double()
    monkeypatch.setattr(type(model), "trainer", Trainer)
    model.log_dict = lambda *args, **kwargs: None
    model.objective.allocate(8)
    model.backbone.eval()  # patches and micro-batches have batch statistics of their own
    views = [torch.randn(4, 3, 16, 16).double(), torch.randn(4, PATCHES, 3, 8, 8).double()]
    batch = [torch.tensor([5, 2, 0, 7]), views, torch.zeros(4, dtype=torch.int64)]
    parts = [tensor.split(rows) for tensor in (batch[0], *batch[1], batch[2])]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    single = model.training_step(batch, 0)
    single.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"backbone.conv1.weight", "projector.local.1.weight"} < gradients.keys()
    model.zero_grad()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    for number, (index, image, stack, labels) in enumerate(zip(*parts, strict=True)):
        model._ends_step = number == 1
        joined = model._joined_step([index, [image, stack], labels], number)
    torch.testing.assert_close(joined / 2, single, rtol=1e-10, atol=1e-10)
    (joined / 2).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-10)
    for name in ("bank.rows", "clock.steps"):
        torch.testing.assert_close(model.objective.criterion.state_dict()[name], after[f"objective.criterion.{name}"])
