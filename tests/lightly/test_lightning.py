"""LightningModules of both flavours, and the benchmarks that are run with them."""

import copy
import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as lightning_pytorch
import pytest
import pytorch_lightning
import torch
from lightly.utils.benchmarking import FinetuneClassifier, KNNClassifier, LinearClassifier
from lightly.utils.lars import LARS
from torch import Tensor, nn

import lightly_ext.lightning
from lightly_ext import benchmarks, lightning
from lightly_ext.benchmarks import __main__ as command
from lightly_ext.benchmarks.schema import validate
from lightly_ext.benchmarks.setup import backbone
from lightly_ext.lightning import pytorch
from lightly_ext.names import CLASS_NAMES
from plugins.methods import METHODS
from plugins.targets import cosine_tau
from plugins.testing import NARROW, OF_VIEWS, recorded_quality, spoil, toy_backbone
from plugins.tools.bad_images import LIST
from plugins.tools.command import UserError

pytestmark = pytest.mark.lightly

SMALL = {**NARROW, "proj_hidden_dim": 12, "proj_output_dim": 8, "pred_hidden_dim": 10, "n_classes": 16}
NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf"])
def test_the_stem_of_a_checkpoint_is_kept(name: str, tmp_path: Path, differing_loads) -> None:
    """The padding of a ResNet and the stride of a RegNet are in no tensor of the checkpoint."""
    options = {"train_dir": tmp_path, "val_dir": tmp_path, "backbone": name, "small_images": True}
    torch.manual_seed(0)
    model = lightning.SSLEY(batch_size_per_device=8, num_classes=10, backbone=backbone(validate(options)))
    checkpoint = {"state_dict": model.state_dict()}
    if name == "resnet18":  # of an earlier release
        assert differing_loads(checkpoint, model.backbone, timm=True) == []
    model.on_save_checkpoint(checkpoint)
    assert differing_loads(checkpoint, model.backbone, name) == []


def built(method: str, flavour: object = lightning, **more: object) -> nn.Module:
    torch.manual_seed(0)
    backbone = toy_backbone()
    options = {key: value for key, value in SMALL.items() if key in METHODS[method].options}
    cls = flavour.__getattr__(NAMES[method])
    return cls(batch_size_per_device=8, num_classes=10, backbone=backbone, **{"optimizer": "sgd", **options, **more})


@pytest.mark.slow
def test_regnets_are_backbones(tmp_path: Path) -> None:
    """The stem for small images has stride 1; SEER's head has the widths that it is given."""
    options = {"train_dir": tmp_path, "val_dir": tmp_path, "backbone": "regnet_y_400mf"}
    plain, small = (backbone(validate({**options, "small_images": small})) for small in (False, True))
    sides = [network.trunk_output(network.stem(torch.zeros(2, 3, 32, 32))).shape[-1] for network in (plain, small)]
    assert sides == [1, 2]
    widths = {"proj_hidden_dim": 12, "proj_output_dim": 8, "proj_layers": 2, "num_prototypes": 10}
    model = lightning.SEER(batch_size_per_device=8, num_classes=10, backbone=small, **widths)
    linear = [tuple(part.weight.shape) for part in model.projection_head.modules() if isinstance(part, nn.Linear)]
    assert linear == [(12, 440), (8, 12)]
    with torch.device("meta"):
        large = backbone(validate({**options, "backbone": "regnet_y_256gf"}))
        assert large(torch.zeros(2, 3, 32, 32)).shape == (2, 10444)


def test_wide_resnets_are_backbones(tmp_path: Path) -> None:
    with torch.device("meta"):
        options = {"train_dir": tmp_path, "val_dir": tmp_path, "backbone": "resnet50x2", "small_images": True}
        network = backbone(validate(options))
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4096)
    assert network.conv1.weight.shape == (128, 3, 3, 3)


@pytest.mark.slow
def test_weights_of_a_file_and_options_reach_the_backbone(tmp_path: Path) -> None:
    """A bare state dict, and the full checkpoint of VICReg's script."""
    options = {"train_dir": tmp_path, "val_dir": tmp_path, "backbone": "resnet18"}
    plain = backbone(validate({**options, "backbone_option": {"zero_init_residual": True}}))
    assert all((block.bn2.weight == 0).all() for layer in (plain.layer1, plain.layer4) for block in layer)
    torch.save(plain.state_dict(), tmp_path / "resnet50.pth")
    full = {f"module.backbone.{name}": value for name, value in plain.state_dict().items()}
    torch.save({"epoch": 1, "model": {**full, "module.projector.0.weight": torch.zeros(1)}}, tmp_path / "model.pth")
    for name in ("resnet50.pth", "model.pth"):
        found = backbone(validate({**options, "weights": tmp_path / name})).state_dict()
        assert all(torch.equal(value, found[key]) for key, value in plain.state_dict().items()), name
    for more, message in (
        (
            {"backbone": "resnet34", "weights": tmp_path / "model.pth"},
            "contains another backbone than resnet34: missing ",
        ),
        ({"weights": tmp_path / "gone"}, "there is no file .*gone"),
        ({"backbone_option": {"depth": 3}}, "--backbone-option: resnet18: .*'depth'"),
        ({"backbone": "amdim_encoder", "input_size": 32, "backbone_option": {"ndf": 0}}, "ndf must be .*, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            backbone(validate({**options, **more}))


def test_heads_of_ssl_ey() -> None:
    """lightly's own is scaled; the other is that of solo-learn and VISSL, which is VICReg's without the last bias."""
    scaled, plain = built("ssl_ey"), built("ssl_ey", scaled_head=False, proj_output_bias=False, proj_layers=4)
    assert type(scaled.projection_head[-1]).__name__ == "ScaledLinear" and len(scaled.projection_head) == 7
    assert type(plain.projection_head[-1]) is nn.Linear and plain.projection_head[-1].bias is None
    assert [type(part) for part in plain.projection_head].count(nn.Linear) == 4


def batches(count: int = 4, rows: int = 8) -> list[tuple[list[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            [torch.randn(rows, 3, 16, 16, generator=generator) for _ in range(2)],
            torch.arange(rows) % 10,
        )
        for _ in range(count)
    ]


def trainer(flavour: object = pytorch_lightning, **options: object) -> object:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return flavour.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "devices": 1, **quiet, **options})


def plain(data: list) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(data, batch_size=None)


@pytest.mark.parametrize("method", OF_VIEWS)
def test_training_moves_every_parameter(method: str) -> None:
    module = built(method, pred_lr_scale=2.0) if "pred_lr_scale" in METHODS[method].options else built(method)
    spec = METHODS[method]
    given = [(views[: spec.views or 2], targets, torch.arange(8)) for views, targets in batches()]
    for views, _, _ in given if spec.stacks else ():
        views.append(torch.stack([views[0][:, :, :8, :8]] * module.options.get("patches", 2), dim=1))
    if spec.indexed:
        module.allocate(8)
    before = copy.deepcopy(dict(module.named_parameters()))
    host = trainer()
    host.fit(module, plain(given), plain([(views[0], targets) for views, targets in batches(1)]))
    for name, parameter in module.named_parameters():
        # a bias in front of batch norm has no gradient but for rounding
        assert torch.isfinite(parameter).all()
        assert name.endswith("bias") or not torch.equal(parameter, before[name]), name
    logged = host.callback_metrics
    assert {"train_loss", "train_online_cls_top1", "val_online_cls_top1", "val_online_cls_top5"} <= set(logged)
    assert ("tau" in logged) == METHODS[method].teacher


def test_loss_is_that_of_the_model() -> None:
    module = built("isoloss")
    expected = copy.deepcopy(module)
    values = []
    module.log = lambda name, value, **_: values.append(value)
    module.log_dict = lambda *_, **__: None
    total = module.training_step(batches(1)[0], 0)
    views, targets = batches(1)[0]
    loss = expected.loss(views)
    features = copy.deepcopy(built("isoloss"))(views[0])
    classifier = nn.functional.cross_entropy(expected.online_classifier.classification_head(features), targets)
    torch.testing.assert_close(values[0], loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(total, loss + classifier, rtol=1e-6, atol=1e-7)


def test_an_epochs_row_is_the_mean_of_its_losses(tmp_path: Path) -> None:
    from lightly_ext.benchmarks.trainer import EpochRecord

    module = built("ssl_ey", log_eigvals=True)
    losses: list[float] = []
    terms = module.terms
    module.terms = lambda embeddings: (found := terms(embeddings), losses.append(float(found.loss.detach())))[0]
    record = EpochRecord(tmp_path)
    trainer(max_epochs=2, callbacks=[record]).fit(module, plain(batches(3)))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "epoch,loss" and [row.split(",")[0] for row in rows] == ["0", "1"]
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [float(row.split(",")[1]) for row in rows] == pytest.approx(means, rel=1e-5)
    spectra = (tmp_path / "eigenvalues.csv").read_text().splitlines()
    assert [len(line.split(",")) for line in spectra] == [1 + SMALL["proj_output_dim"]] * 3
    assert record.images == 2 * 3 * 8 and record.seconds > 0


def test_teacher_moves_once_per_optimizer_step() -> None:
    """Four batches, two accumulated: two steps, with τ of a run of two."""
    module = built("byol", base_tau=0.5)
    taus: list[float] = []
    move = module.update_momentum
    module.update_momentum = lambda m: (taus.append(m), move(m))
    trainer(accumulate_grad_batches=2).fit(module, plain(batches(4)))
    assert taus == [cosine_tau(0, 2, 0.5, 1.0), cosine_tau(1, 2, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("given", "images", "kind", "rate"),
    [
        ({"optimizer": None}, 8, torch.optim.SGD, 0.24),
        ({"optimizer": None}, 1024, LARS, 0.45),
        ({"optimizer": None, "lr": 0.3}, 8, torch.optim.SGD, 0.3),
        ({"optimizer": "adamw"}, 8, torch.optim.AdamW, 0.002),
        ({"optimizer": "lars"}, 8, LARS, 0.45),
    ],
)
def test_default_optimizer_and_rate(given: dict, images: int, kind: type, rate: float) -> None:
    module = built("byol", **given)
    module.batch_size_per_device = images
    host = trainer()
    host.fit(module, plain(batches(1)))
    (optimizer,) = (getattr(found, "optimizer", found) for found in host.optimizers)
    assert type(optimizer) is kind
    groups = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert groups["backbone"] == rate * images / 256


def test_learning_rates_and_weight_decay() -> None:
    module = built("byol", lr=0.5, weight_decay=0.1, warmup_epochs=0, pred_lr_scale=10.0)
    host = trainer()
    host.fit(module, plain(batches(1)))
    groups = {group["name"]: group for group in host.optimizers[0].param_groups}
    rates = {name: group["initial_lr"] for name, group in groups.items()}
    base = 0.5 * 8 / 256
    assert rates["backbone"] == rates["online_classifier"] == base and rates["prediction_head"] == 10 * base
    assert {name for name, group in groups.items() if group["weight_decay"]} == {
        "backbone",
        "projection_head",
        "prediction_head",
    }
    assert all(p.ndim > 1 for name in ("backbone", "projection_head") for p in groups[name]["params"])
    trained = {id(p) for group in groups.values() for p in group["params"]}
    assert trained == {id(p) for p in module.parameters() if p.requires_grad}


def test_everything_decays_where_that_is_asked_for() -> None:
    module = built("matrix_ssl", optimizer="sgd", weight_decay=0.1, decay_all=True)
    host = trainer()
    host.fit(module, plain(batches(1)))
    plainly = [group["name"] for group in host.optimizers[0].param_groups if not group["weight_decay"]]
    assert plainly == ["online_classifier"]


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_a_label_beyond_the_classes_is_a_sentence(kind: str) -> None:
    """torch ends with an IndexError, and a GPU with an assertion that leaves it unusable."""
    module = built("isoloss")
    ((views, _),) = batches(1)
    given = plain([(views, torch.full((8,), 10))]), plain([(views[0], torch.full((8,), 10))])
    with pytest.raises(UserError, match=r"^a batch has the label 10, but the online classifier .* needs at least 11$"):
        if kind == "training":
            trainer().fit(module, given[0])
        else:
            trainer().validate(module, given[1])


def test_flavours_fit_their_trainers() -> None:
    assert lightning.IsoLoss is lightly_ext.lightning.IsoLoss
    assert issubclass(lightning.IsoLoss, pytorch_lightning.LightningModule)
    assert not issubclass(pytorch.IsoLoss, pytorch_lightning.LightningModule)
    trainer(lightning_pytorch).fit(built("isoloss", pytorch), plain(batches(1)))
    with pytest.raises(TypeError):
        trainer(lightning_pytorch).fit(built("isoloss"), plain(batches(1)))
    for module in (lightning, pytorch):
        assert pickle.loads(pickle.dumps(module.__getattr__("SSLEY"))) is module.__getattr__("SSLEY")
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            module.__getattr__("Nothing")


def test_constructor_of_lightlys_benchmarks() -> None:
    module = lightning.SimSiam(batch_size_per_device=4, num_classes=3)
    assert module.feature_dim == module.online_classifier.feature_dim == 2048
    assert module.online_classifier.topk == (1,)
    assert {"backbone", "projection_head", "online_classifier"} <= set(dict(module.named_children()))
    with pytest.raises(ValueError, match="optimizer must be one of lars, sgd, adamw, got 'adam'"):
        built("isoloss", optimizer="adam")
    with pytest.raises(ValueError, match="base must be in"):
        built("isoloss", base_tau=2.0)


def test_checkpoints_load(tmp_path: Path) -> None:
    module = built("isoloss", rho=0.5)
    host = trainer(logger=False)
    host.fit(module, plain(batches(2)))
    host.save_checkpoint(tmp_path / "model.ckpt")
    backbone = copy.deepcopy(built("isoloss").backbone)
    loaded = lightning.IsoLoss.load_from_checkpoint(tmp_path / "model.ckpt", backbone=backbone)
    assert loaded.options["rho"] == 0.5
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert {"teacher_backbone.0.weight", "prediction_head.C", "prediction_head.W"} <= set(state)


@pytest.mark.filterwarnings("error:Current step number:RuntimeWarning")
def test_a_run_that_is_made_longer_follows_the_schedule_of_its_new_length(tmp_path: Path) -> None:
    data, rates = plain(batches(4)), []

    class Rates(pytorch_lightning.Callback):
        def on_train_batch_start(self, host: object, *_: object) -> None:
            rates.append(host.optimizers[0].param_groups[0]["lr"])

    for epochs, path in ((1, None), (3, tmp_path / "model.ckpt"), (3, None)):
        host = trainer(max_epochs=epochs, callbacks=[Rates()])
        host.fit(built("ssl_ey", warmup_epochs=0.5), data, ckpt_path=path, weights_only=path is not None)
        host.save_checkpoint(tmp_path / "model.ckpt")
    assert rates[4:12] == rates[16:], "the epochs 1 and 2 of the resumed run and of the uninterrupted one"


@pytest.mark.parametrize("method", ["ssl_ey", "isoloss"])
def test_lightlys_evaluation_runs_on_them(method: str) -> None:
    """lightly's unmodified kNN, linear and fine-tuning evaluations of the model class and of the LightningModule."""
    labelled = [(views[0], targets) for views, targets in batches(3)]
    from lightly_ext import models

    options = {key: value for key, value in SMALL.items() if key in METHODS[method].options}
    model = vars(models)[NAMES[method]](built(method).backbone, **options)
    for each in (model, built(method)):
        before = copy.deepcopy(each.state_dict())
        knn = KNNClassifier(each, num_classes=10, knn_k=5, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1)
        (_, metrics) = trainer().validate(knn, [plain(labelled), plain(labelled)], verbose=False)
        assert metrics["val_knn_top5/dataloader_idx_1"] == 1.0, "each image is its own neighbour"
        linear = LinearClassifier(each, batch_size_per_device=8, feature_dim=8, num_classes=10)
        trainer().fit(linear, plain(labelled))
        assert all(torch.equal(value, before[name]) for name, value in each.state_dict().items()), "a frozen backbone"
        finetune = FinetuneClassifier(each, batch_size_per_device=8, feature_dim=8, num_classes=10)
        trainer().fit(finetune, plain(labelled))
        assert not torch.equal(each.backbone[0].weight, before["backbone.0.weight"])


# ------------------------------------------------------------------------------------------------------ benchmarks


def test_methods_have_lightlys_shape() -> None:
    assert set(benchmarks.METHODS) == set(METHODS)
    for name, entry in benchmarks.METHODS.items():
        assert set(entry) == {"model", "transform"}
        assert entry["model"] is lightning.__getattr__(NAMES[name]) and callable(entry["transform"])


QUICK = (
    *("--epochs", "1", "--batch-size-per-device", "16", "--num-workers", "0", "--accelerator", "cpu"),
    *("--backbone", "resnet18", "--input-size", "16", "--linear-epochs", "1", "--finetune-epochs", "1"),
    *("--knn-k", "5", "--optimizer", "adamw", "--lr", "0.01", "--seed", "0"),
    *("--option", "proj_hidden_dim=16", "proj_output_dim=8", "--transform", "min_scale=0.6"),
)

OTHER = """
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import VICRegTransform
from lightly.utils.benchmarking import OnlineLinearClassifier
from pytorch_lightning import LightningModule
from torch import nn, optim
from plugins.testing import NARROW


class VICReg(LightningModule):
    def __init__(self, batch_size_per_device, num_classes):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection_head = VICRegProjectionHead(8, 8, 8, num_layers=2)
        self.criterion = VICRegLoss()
        self.online_classifier = OnlineLinearClassifier(8, num_classes)

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        z = [self.projection_head(self(view)) for view in batch[0]]
        loss = self.criterion(*z)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.01)


METHODS = {"vicreg": {"model": VICReg, "transform": VICRegTransform(input_size=16, gaussian_blur=0.0)}}
"""


@pytest.mark.slow
def test_benchmark_of_ours_and_of_lightlys(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "main.py"
    other.write_text(OTHER)
    folders = (
        "--train-dir",
        str(digits / "train"),
        "--val-dir",
        str(digits / "val"),
        "--log-dir",
        str(tmp_path / "logs"),
    )
    command.main([*folders, *QUICK, "--methods", "isoloss", "vicreg", "--add", str(other)])
    printed = capsys.readouterr().out.rstrip().splitlines()
    table = (tmp_path / "logs" / "table.md").read_text().splitlines()
    assert printed[-4:] == table
    assert re.split(r"\s*\|\s*", table[0].strip("| "))[:4] == ["Method", "Epochs", "kNN top1", "kNN top5"]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["isoloss", "vicreg"]
    for name, row in zip(("isoloss", "vicreg"), table[2:], strict=True):
        result = json.loads((tmp_path / "logs" / name / "result.json").read_text())
        shown = [float(cell) for cell in row.strip("| ").split("|")[2:]]
        expected = [100 * result[kind][k] for kind in ("knn", "linear", "finetune") for k in ("top1", "top5")]
        assert shown == pytest.approx(expected, abs=0.005)
        assert result["framework"] == "lightly" and result["epochs"] == 1 and result["train_loss"] is not None
        assert (tmp_path / "logs" / name / "checkpoint.ckpt").is_file()

    # the checkpoint alone gives the same neighbours
    only = ("--epochs", "0", "--methods", "isoloss", "--skip-linear-eval", "--skip-finetune-eval")
    checkpoint = ("--ckpt-path", str(tmp_path / "logs" / "isoloss" / "checkpoint.ckpt"))
    first = json.loads((tmp_path / "logs" / "isoloss" / "result.json").read_text())
    command.main([*folders, *QUICK, *only, *checkpoint])
    assert json.loads((tmp_path / "logs" / "isoloss" / "result.json").read_text())["knn"] == first["knn"]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_print_one_table(digits: Path, tmp_path: Path) -> None:
    """The command uses its default strategy; teacher and prediction matrix are in the checkpoint.

    The quality that it logs is that of the rows of both processes.
    """
    images, rows = tmp_path / "digits", tmp_path / "rows"
    rows.mkdir()
    record = (
        f"from pathlib import Path\nfrom plugins.testing import record_quality\nrecord_quality(Path({str(rows)!r}))"
    )
    (tmp_path / "sitecustomize.py").write_text(record)  # each process imports it as it starts
    shutil.copytree(digits, images)
    # of the validation images, each process reads one
    paths = [next((images / "train" / "3").iterdir()), *sorted((images / "val" / "0").iterdir())[:2]]
    bad = [str(spoil(path)) for path in paths]
    folders = ["--train-dir", str(images / "train"), "--val-dir", str(images / "val"), "--log-dir", str(tmp_path)]
    more = ["--methods", "isoloss", "--devices", "2", "--skip-linear-eval", "--skip-finetune-eval", "--skip-bad-images"]
    more += ["--option", "proj_hidden_dim=16", "proj_output_dim=8", "log_quality=features"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lightly_ext.benchmarks", *folders, *QUICK, *more],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "exists and is not empty" not in done.stderr and "LeafSpec" not in done.stderr
    assert done.stdout.count("| Method ") == 1 and done.stdout.count("pre-training for 1 epoch\n") == 1
    assert (tmp_path / "isoloss" / LIST).read_text().splitlines() == bad
    assert json.loads((tmp_path / "isoloss" / "result.json").read_text())["bad_images"] == 3
    assert done.stdout.count("3 images could not be decoded") == 1
    state = torch.load(tmp_path / "isoloss" / "checkpoint.ckpt", weights_only=True)
    # 80 images are two steps of 2 x 16 and a rest: two updates of the second moment each
    assert state["global_step"] == 2 and int(state["state_dict"]["prediction_head.steps"]) == 4
    (wanted,) = recorded_quality(rows)
    with (tmp_path / "isoloss" / "pretrain" / "metrics.csv").open() as lines:
        logged = [row for row in csv.DictReader(lines) if row["quality/features/rankme"]]
    assert len(logged) == 1
    for name, value in wanted.items():
        assert float(logged[0][name]) == pytest.approx(value, rel=1e-5), name


def test_an_evaluation_does_not_need_the_transform_of_the_training(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The default patches of CPC do not fill images of 20 pixels."""
    folders = ["--train-dir", str(digits / "train"), "--val-dir", str(digits / "val"), "--log-dir", str(tmp_path)]
    words = [*folders, "--methods", "cpc", "--backbone", "resnet8", "--input-size", "20", "--accelerator", "cpu"]
    words += ["--batch-size-per-device", "16", "--knn-k", "5", "--option", "grid=4", "patch=8", "stride=4"]
    with pytest.raises(SystemExit):
        command.main([*words, "--epochs", "1"])
    assert "do not fill an image of 20 pixels" in capsys.readouterr().err
    nothing = ["--skip-knn-eval", "--skip-linear-eval", "--skip-finetune-eval"]
    command.main([*words, "--epochs", "0", *nothing])
    assert json.loads((tmp_path / "cpc" / "result.json").read_text())["epochs"] == 0


@pytest.mark.slow
def test_mistakes_are_one_sentence(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty"
    (empty / "0").mkdir(parents=True)
    fewer = tmp_path / "fewer"  # its class 4 would have the label 3
    shutil.copytree(digits / "val", fewer, ignore=lambda _, names: {"3"} & set(names))
    folders = [
        "--train-dir",
        str(digits / "train"),
        "--val-dir",
        str(digits / "val"),
        "--log-dir",
        str(tmp_path / "logs"),
    ]
    good = [*folders, *QUICK, "--methods", "isoloss"]
    (tmp_path / "none.py").write_text("x = 1\n")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    cases = [
        (["--methods", "barlow"], "--methods: unknown method 'barlow'; choose from amdim, barlow_twins, byol, "),
        (["--methods", "isolos"], "; did you mean isoloss?"),
        (["--train-dir", str(tmp_path / "gone")], f"--train-dir: there is no folder {tmp_path / 'gone'}"),
        (["--val-dir", str(empty)], f"--val-dir: there are no images in class folders of {empty}"),
        (
            ["--val-dir", str(fewer)],
            f"{digits / 'train'} and {fewer} have different class folders: only one of them has 3",
        ),
        (["--batch-size-per-device", "128"], "a batch of 128 exceeds the number of training images, 80"),
        (["--batch-size-per-device", "1"], "--batch-size-per-device must be an integer, at least 2, got 1"),
        (["--knn-k", "100"], "--knn-k must not exceed the number of training images, 80, got 100"),
        (["--backbone", "resnet81"], "--backbone: unknown model 'resnet81'; choose from alexnet, "),
        (["--backbone", "vgg11", "--small-images"], "--small-images needs a ResNet or a RegNet, got --backbone vgg11"),
        (["--option", "alhpa=1.0"], "isoloss: method isoloss has no option 'alhpa'; known options: alpha, "),
        (["--option", "rho"], "--option must be KEY=VALUE, got 'rho'"),
        (["--option", "rho=high"], "isoloss: method isoloss: rho must be a float, got 'high'"),
        (["--transform", "minscale=1"], "--transform: IsoLossTransform has no argument 'minscale'; known arguments: "),
        (["--mean", "0", "0", "0"], "--mean and --std must be given together"),
        (["--add", str(tmp_path / "none.py")], "has no METHODS of the form"),
        (["--ckpt-path", str(tmp_path / "gone")], f"--ckpt-path: there is no file {tmp_path / 'gone'}"),
        (["--ckpt-path", str(tmp_path)], f"--ckpt-path: {tmp_path} is a folder"),
        (
            ["--methods", "byol", "isoloss", "--ckpt-path", str(tmp_path / "none.py")],
            "--ckpt-path needs one method, got 2; select it with --methods",
        ),
        (
            ["--ckpt-path", str(tmp_path / "none.py")],
            f"--ckpt-path: {tmp_path / 'none.py'} is not a checkpoint of Lightning",
        ),
        (
            ["--ckpt-path", str(tmp_path / "other.ckpt")],
            "has another method, backbone or options than this run of isoloss",
        ),
        (["--transform", "min_scale=big"], "--transform: '>' not supported"),
        (["--transform", "min_scale=2"], "--transform: uniform_ expects"),
        (["--transform", "cj_prob=7"], "--transform: `p` should be a floating point value"),
        (
            ["--mean", "0", "0", "0", "--std", "1", "1", "0"],
            "--std must be three numbers, above 0, got [1.0",
        ),
        (["--knn-t", "0"], "--knn-t must be a number above 0, got 0.0"),
        (["--linear-lr", "nan"], "--linear-lr must be a number above 0, got nan"),
        (["--seed", "-1"], "--seed must be an integer in [0, 4294967295], got -1"),
        (
            ["--log-dir", str(tmp_path / "none.py" / "logs")],
            f"--log-dir: {tmp_path / 'none.py'} is a file, not a folder",
        ),
        (
            ["--precision", "17"],
            "Lightning does not accept --accelerator cpu --devices 1 --strategy auto --precision 17: ",
        ),
        (["--accelerator", "abacus"], "Lightning does not accept --accelerator abacus "),
        (["--strategy", "nonsense"], "Lightning does not accept --accelerator cpu --devices 1 --strategy nonsense "),
        (["--epochs", "many"], "--epochs must be an integer, at least 0, got 'many'"),
    ]
    for more, sentence in cases:
        with pytest.raises(SystemExit) as stopped:
            command.main([*good, *more])
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said.startswith("error: ") and sentence in said and said.count("\n") == 1, said
    assert not (tmp_path / "logs").exists()
