"""Every configuration of our methods composes, and builds model, loss, optimiser, schedule and views."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from classy_vision.optim import build_optimizer_schedulers
from classy_vision.optim.param_scheduler import UpdateInterval
from vissl.data.ssl_transforms import get_transform
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from plugins.methods import METHODS
from vissl_ext.checks import check_sections
from vissl_ext.larc import LARC
from vissl_ext.registry import register
from vissl_ext.task import PluginTask, check_config
from vissl_ext.views import patches_of

register()
pytestmark = pytest.mark.vissl

ROOT = Path(__file__).parents[2] / "configs" / "vissl" / "config"
OURS = sorted(
    str(path.relative_to(ROOT).with_suffix(""))
    for path in (ROOT / "pretrain").rglob("*.yaml")
    if path.parent.name in METHODS
)


def test_every_method_has_its_three() -> None:
    expected = {f"pretrain/{method}/{data}" for method in METHODS for data in ("digits", "cifar", "imagenet_rn50")}
    on_hundred = ("corinfomax", "i_vne", "matrix_ssl", "mec", "rectified_lpjepa")
    hundred = {f"pretrain/{method}/imagenet100" for method in on_hundred}
    assert expected | hundred <= set(OURS)


@pytest.mark.sample("pretrain/isoloss/digits", "pretrain/dissl/cifar", "pretrain/cissl/imagenet_rn50")
@pytest.mark.parametrize("name", OURS)
def test_pretraining_configuration_builds(name: str) -> None:
    from PIL import Image

    cfg = compose_hydra_configuration([f"config={name}"])
    check_sections(cfg)
    config: Any = convert_to_attrdict(cfg, dump_config=False)[1]
    config.MACHINE.DEVICE, config.MODEL.AMP_PARAMS.USE_AMP = "cpu", False
    config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN = False
    check_config(config)
    task = PluginTask.from_config(config)
    task.device = torch.device("meta")  # no weights, which nothing here looks at
    with task.device:
        task.base_model = task._build_model()
    head = task.base_model.heads[0]
    weights = [parameter for parameter in head.projector.parameters() if parameter.ndim > 1]
    if head.options.get("project_features", True):
        assert head.in_dim == weights[0].shape[1]
    task.base_loss = task._build_loss()
    task.optimizer, task.optimizer_schedulers = task._build_optimizer(), task._build_optimizer_schedulers()
    task.prepare_optimizer()

    transform = get_transform(config.DATA.TRAIN.TRANSFORMS)
    noise = Image.effect_noise((300, 300), 50).convert("RGB")
    views = transform({"data": [noise], "label": [0], "data_valid": [True], "data_idx": [0]})["data"]
    stacks = [view for view in views if view.ndim == 4]
    patches = patches_of(config.DATA.TRAIN.TRANSFORMS)
    assert [len(stack) for stack in stacks] == [patches and patches.count] * head.stacks
    assert all(patches.side in (None, stack.shape[-1]) for stack in stacks)
    views = views[: len(views) - len(stacks)]
    assert len(views) == (config.DATA.TRAIN.TRANSFORMS[0].get("total_num_crops") or head.views)
    crop = {"digits": 16, "cifar": 32, "stl10": 64, "imagenet128": 128, "imagenet100": 224, "imagenet_rn50": 224}[
        name.rpartition("/")[2].partition("_e")[0]
    ]
    assert all(view.shape == (3, crop, crop) for view in views[:2])
    small = 98 if name.startswith("pretrain/lejepa") else 96
    assert all(view.shape == (3, small, small) for view in views[2:])

    # the peak of the schedule is the base value times the images of a step over 256
    images = (
        config.DATA.TRAIN.BATCHSIZE_PER_REPLICA * config.DISTRIBUTED.NUM_NODES * config.DISTRIBUTED.NUM_PROC_PER_NODE
    )
    schedule = task.optimizer_schedulers["lr"]
    peak = max(schedule(step / 1000) for step in range(1000))
    base = config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling
    assert peak == pytest.approx(base.base_value * images / base.base_lr_batch_size, rel=1e-4)
    assert sum(parameter.numel() for parameter in task.base_model.trunk.parameters()) > (7e4 if crop == 16 else 1e7)


@pytest.mark.parametrize("data", ["digits", "cifar", "imagenet_rn50", "imagenet100"])
def test_i_vne_weighs_the_cosine_by_the_logarithm_of_the_joined_batch(data: str) -> None:
    config: Any = compose_hydra_configuration([f"config=pretrain/i_vne/{data}"]).config
    nodes, processes = config.DISTRIBUTED.NUM_NODES, config.DISTRIBUTED.NUM_PROC_PER_NODE
    images = config.DATA.TRAIN.BATCHSIZE_PER_REPLICA * nodes * processes
    assert config.LOSS.i_vne.alpha_1 == pytest.approx(math.log(images), abs=0.005)


@pytest.mark.parametrize(
    ("data", "images", "rate", "last", "epochs", "options"),
    [
        ("cifar", 512, 0.5, 1e-6, 1000, (2048, 64, False, 250, 0.01)),
        ("imagenet100", 1024, 1.0, 5e-3, 400, (4096, 128, False, 500, 0.01)),
        ("imagenet_rn50", 1536, 0.2, 1e-6, 100, (8192, 512, True, 2000, 0.1)),
    ],
)
def test_published_settings_of_corinfomax(
    data: str, images: int, rate: float, last: float, epochs: int, options: tuple[Any, ...]
) -> None:
    config: Any = compose_hydra_configuration([f"config=pretrain/corinfomax/{data}"]).config
    processes = config.DISTRIBUTED.NUM_NODES * config.DISTRIBUTED.NUM_PROC_PER_NODE
    assert config.DATA.TRAIN.BATCHSIZE_PER_REPLICA * processes == images
    optimizer, given = config.OPTIMIZER, config.LOSS.corinfomax
    schedule = optimizer.param_schedulers.lr
    peak = schedule.auto_lr_scaling.base_value * images / schedule.auto_lr_scaling.base_lr_batch_size
    assert (peak, peak * schedule.end_value) == pytest.approx((rate, last), rel=1e-6)
    assert schedule.warmup * epochs == pytest.approx(10) and schedule.warmup_value == 3e-3
    assert (optimizer.name, optimizer.use_larc, optimizer.num_epochs) == ("sgd", False, epochs)
    assert optimizer.regularize_bn and optimizer.regularize_bias and optimizer.weight_decay == 1e-4
    names = ("proj_hidden_dim", "proj_output_dim", "proj_norm", "sim_weight", "covariance_momentum")
    assert tuple(given[name] for name in names) == options and given.mean_momentum == given.covariance_momentum
    steps = {step.name: step for step in config.DATA.TRAIN.TRANSFORMS}
    assert steps["RandomResizedCrop"].scale == [0.08, 1.0] and config.MODEL.TRUNK.RESNETS.ZERO_INIT_RESIDUAL
    random = [step.prob for step in config.DATA.TRAIN.TRANSFORMS if step.name == "ImgPilMultiCropRandomApply"]
    assert random == [[0.8, 0.8], [1.0, 0.1], [0.0, 0.2]]


LINEAR = "benchmark/linear_image_classification"


@pytest.mark.sample("digits-*")
@pytest.mark.parametrize(("data", "classes", "rate"), [("imagenet1k", 1000, 0.48), ("digits", 10, 1.0)])
def test_linear_evaluation_with_larc_builds(data: str, classes: int, rate: float) -> None:
    """A frozen ResNet-50, the norm without scale and shift, LARC without decay, a cosine epoch by epoch."""
    cfg = compose_hydra_configuration([f"config={LINEAR}/{data}/eval_resnet50_normalized_linear"])
    config: Any = convert_to_attrdict(cfg, dump_config=False)[1]
    config.MACHINE.DEVICE, config.MODEL.WEIGHTS_INIT.PARAMS_FILE = "cpu", ""
    check_config(config)
    task = PluginTask.from_config(config)
    with torch.device("meta"):
        task.base_model = task._build_model()
    trained = {name: tuple(p.shape) for name, p in task.base_model.named_parameters() if p.requires_grad}
    assert trained == {"heads.0.clf.1.weight": (classes, 2048), "heads.0.clf.1.bias": (classes,)}
    task.optimizer, task.optimizer_schedulers = task._build_optimizer(), task._build_optimizer_schedulers()
    task.prepare_optimizer()
    inner = task.optimizer.optimizer
    assert isinstance(inner, LARC)
    assert (inner.trust_coefficient, inner.clip, inner.exclude_bias_and_norm) == (0.001, False, False)
    assert all(group["weight_decay"] == 0 for group in inner.param_groups)
    schedule = task.optimizer_schedulers["lr"]
    assert schedule.update_interval == UpdateInterval.EPOCH
    epochs = config.OPTIMIZER.num_epochs
    assert schedule(0) == pytest.approx(rate)
    assert schedule((epochs / 2) / epochs) == pytest.approx(rate / 2)


@pytest.mark.sample("100-400-mec")
@pytest.mark.parametrize("method", ["matrix_ssl", "mec"])
@pytest.mark.parametrize(("suffix", "epochs"), [("_rn50", 100), ("_rn50_e200", 200), ("_rn50_e400", 400), ("100", 400)])
def test_ten_epochs_of_warm_up_however_long_the_run(method: str, suffix: str, epochs: int) -> None:
    cfg = compose_hydra_configuration([f"config=pretrain/{method}/imagenet{suffix}"])
    config: Any = convert_to_attrdict(cfg, dump_config=False)[1]
    assert config.OPTIMIZER.num_epochs == epochs
    assert config.OPTIMIZER.param_schedulers.lr.warmup * epochs == pytest.approx(10)
    (crop,) = [t for t in config.DATA.TRAIN.TRANSFORMS if t["name"] == "RandomResizedCrop"]
    assert crop["scale"] == [0.2, 1.0]
    schedule = build_optimizer_schedulers(config.OPTIMIZER)["lr"]
    assert schedule.update_interval == UpdateInterval.STEP
    per_epoch, peak = {"100": (494, 0.5)}.get(suffix, (1251, 2.0))
    warm, total = 10 * per_epoch, epochs * per_epoch
    assert schedule(0) == 0
    # a step later than in the published code, whose last step of the warm-up has the peak
    assert schedule((warm - 1) / total) == pytest.approx(peak * (warm - 1) / warm, rel=1e-9)
    assert schedule(warm / total) == pytest.approx(peak, rel=1e-9)
    assert schedule((warm + 1) / total) < peak
    assert schedule((warm + total) / 2 / total) == pytest.approx(peak / 2, rel=1e-9)
    assert 0 < schedule((total - 1) / total) < 1e-7


@pytest.mark.parametrize(
    ("data", "per_epoch", "milestones"),
    [
        ("cifar", 50000 // 480, (251, 281, 300)),
        ("stl10", 105000 // 480, (251, 281, 300)),
        ("imagenet128", 1281167 // 480, (31, 46, 50)),
        ("imagenet_rn50", 1281167 // 480, (61, 91, 100)),
    ],
)
def test_amdim_warms_up_for_500_steps(data: str, per_epoch: int, milestones: tuple[int, int, int]) -> None:
    """(k + 1) / 500 of the rate in step k, and a fifth of it from each milestone on."""
    cfg = compose_hydra_configuration([f"config=pretrain/amdim/{data}"])
    config: Any = convert_to_attrdict(cfg, dump_config=False)[1]
    first, second, epochs = milestones
    assert config.OPTIMIZER.num_epochs == epochs
    schedule, total = build_optimizer_schedulers(config.OPTIMIZER)["lr"], epochs * per_epoch
    assert schedule.update_interval == UpdateInterval.STEP
    for step in (0, 1, 250, 498):
        assert schedule(step / total) == pytest.approx(2e-4 * (step + 1) / 500, rel=3e-3), step
    for step, rate in (
        *((501, 2e-4), (first * per_epoch - 1, 2e-4), (first * per_epoch, 4e-5)),
        *((second * per_epoch - 1, 4e-5), (second * per_epoch, 8e-6), (total - 1, 8e-6)),
    ):
        assert schedule(step / total) == pytest.approx(rate, rel=1e-9), step


@pytest.mark.sample("mec-of_loss1-_e200")
@pytest.mark.parametrize("suffix", ["", "_e200", "_e400"])
@pytest.mark.parametrize(
    ("method", "of_loss"),
    [
        ("matrix_ssl", {"mce_lambd": 1.0, "mce_mu": 1.0, "gamma": 1.0, "mce_order": 4}),
        ("mec", {"eps": 64.0, "mec_order": 4, "warmup_iter": 12510}),
    ],
)
def test_settings_of_matrix_ssl_and_mec_on_imagenet(method: str, of_loss: dict[str, Any], suffix: str) -> None:
    cfg = compose_hydra_configuration([f"config=pretrain/{method}/imagenet_rn50{suffix}"])
    config: Any = convert_to_attrdict(cfg, dump_config=False)[1]
    networks = {"proj_hidden_dim": 2048, "proj_output_dim": 2048, "pred_hidden_dim": 512}
    given = {key: value for key, value in config.LOSS[method].items() if key != "name"}
    assert given == {**networks, **of_loss, "base_tau": 0.996, "final_tau": 1.0}
    optimizer = config.OPTIMIZER
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov, optimizer.use_larc) == ("sgd", 0.9, False, False)
    assert (optimizer.weight_decay, optimizer.regularize_bn, optimizer.regularize_bias) == (1e-5, True, True)
    scaling = optimizer.param_schedulers.lr.auto_lr_scaling
    assert (scaling.auto_scale, scaling.base_value, scaling.base_lr_batch_size) == (True, 0.5, 256)
    assert optimizer.param_schedulers.lr.start_value == pytest.approx(2.0)
    assert (optimizer.param_schedulers.lr.warmup_value, optimizer.param_schedulers.lr.end_value) == (0.0, 0.0)
    machines = config.DISTRIBUTED
    assert (machines.NUM_NODES, machines.NUM_PROC_PER_NODE, config.DATA.TRAIN.BATCHSIZE_PER_REPLICA) == (1, 8, 128)
    trunk = config.MODEL.TRUNK
    assert (trunk.NAME, trunk.RESNETS.DEPTH, trunk.RESNETS.ZERO_INIT_RESIDUAL) == ("resnet", 50, True)
    assert config.MODEL.AMP_PARAMS.USE_AMP is False
    assert config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN is True
    of_views = {
        inner["name"]: transform["prob"]
        for transform in config.DATA.TRAIN.TRANSFORMS
        for inner in transform.get("transforms", ())
    }
    assert of_views == {"ColorJitter": [0.8, 0.8], "ImgPilGaussianBlur": [1.0, 0.1], "RandomSolarize": [0.0, 0.2]}
