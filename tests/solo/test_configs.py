"""Every YAML file in configs/: it starts with its purpose, composes, and builds."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from plugins.methods import METHODS
from plugins.methods.cpc import offsets
from plugins.tools.command import UserError
from solo_ext.compat import LinearModel
from solo_ext.compat.common import with_schedule
from solo_ext.config import count_stacks, parse_linear, parse_pretrain
from solo_ext.launch import config_folder
from solo_ext.registry import method_class, register
from solo_ext.transforms import patches_of

ROOT = Path(__file__).parents[2] / "configs" / "solo"
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml"))
GROUPS = ("teacher", "strength")
COMPLETE = [
    path
    for path in FILES
    if path.name != "base.yaml" and path.parent.name not in GROUPS and not path.stem.startswith("probe")
]
SELF_SUPERVISED = [path for path in COMPLETE if not path.stem.startswith(("linear", "supervised"))]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders, for what looks whether they are there."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
    return folder


def load(path: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / path.parent), version_base="1.2"):
        return compose(path.stem, list(overrides))


def local(images: Path) -> list[str]:
    """Return the overrides with which any configuration can be built here."""
    return [
        f"data.train_path={images / 'train'}",
        f"data.val_path={images / 'val'}",
        "++accelerator=cpu",
        "++devices=1",
    ]


def test_every_data_set_of_the_suites_has_its_folder():
    assert {path.parts[0] for path in FILES} == {
        *("cifar", "digits", "imagenet", "imagenet100", "stl10", "tinyimagenet"),
    }


@pytest.mark.parametrize("path", FILES, ids=str)
def test_first_lines_say_purpose_and_command(path):
    text = (ROOT / path).read_text()
    head = [line for line in text.splitlines()[:4] if line.startswith("#") and "@package" not in line]
    assert head, "no comment"
    for folder, name in re.findall(r"--config-path (\S+) --config-name (\S+)", "\n".join(head)):
        assert config_folder(folder) == (ROOT / path).parent
        assert name == path.name
    if path in SELF_SUPERVISED and " as " not in head[0] and path.stem != "untrained":
        assert "--config-name" in "\n".join(head)


@pytest.mark.sample("digits/isoloss.yaml", "digits/short/cissl.yaml", "cifar/dissl.yaml", "imagenet/mec.yaml")
@pytest.mark.parametrize("path", SELF_SUPERVISED, ids=str)
def test_pretraining_builds(path, images):
    """The configuration is accepted unchanged; the network of CIFAR and digits is built, with small heads."""
    cfg = parse_pretrain(load(path, *local(images)))
    register()
    cls = method_class(cfg)
    if hasattr(cls, "spec"):
        cls.spec.resolve(OmegaConf.to_container(cfg.method_kwargs))
        cls.spec.check_views(cfg.data.num_large_crops, cfg.data.num_small_crops, count_stacks(cfg.augmentations))
    if path.parts[0] in ("imagenet", "stl10", "tinyimagenet"):
        return
    small = {"proj_hidden_dim": 8, "n_classes": 4}
    if cfg.method_kwargs.get("projector", True):
        small["proj_output_dim"] = 4
    known = cls.spec.options if hasattr(cls, "spec") else cfg.method_kwargs
    for key, value in small.items():
        if key in known:
            cfg.method_kwargs[key] = value
    wide = 64 if path.parent.name == "digits" else 440 if path.stem == "seer" else 512
    if cfg.backbone.name == "resnet50":
        wide = 2048
    if cfg.backbone.name == "amdim_encoder":
        wide = cfg.method_kwargs.proj_output_dim = 16
        cfg.backbone.kwargs.update(ndf=4, n_rkhs=wide, n_depth=1)
    with torch.device("cpu" if path.parent.name == "digits" else "meta"):  # ResNets take long to initialise
        assert cls(cfg).features_dim == wide


@pytest.mark.parametrize("folder", ["digits", "cifar", "imagenet", "imagenet100"])
def test_i_vne_weighs_the_cosine_by_the_logarithm_of_the_joined_batch(folder):
    cfg = load(Path(folder) / "i_vne.yaml")
    assert cfg.method_kwargs.alpha_1 == pytest.approx(math.log(cfg.optimizer.batch_size * cfg.devices), abs=0.005)


@pytest.mark.parametrize(
    ("folder", "images", "rate", "last", "epochs", "backbone", "options"),
    [
        ("cifar", 512, 0.5, 1e-6, 1000, "resnet18", (2048, 64, False, 250, 0.01)),
        ("tinyimagenet", 1024, 0.5, 1e-6, 800, "resnet50", (4096, 128, False, 500, 0.1)),
        ("imagenet100", 1024, 1.0, 5e-3, 400, "resnet18", (4096, 128, False, 500, 0.01)),
        ("imagenet", 1536, 0.2, 1e-6, 100, "resnet50", (8192, 512, True, 2000, 0.1)),
    ],
)
def test_published_settings_of_corinfomax(folder, images, rate, last, epochs, backbone, options):
    cfg = load(Path(folder) / "corinfomax.yaml")
    OmegaConf.resolve(cfg)
    optimizer, given = cfg.optimizer, cfg.method_kwargs
    assert optimizer.batch_size * cfg.devices == images
    assert (optimizer.lr * images / 256, float(cfg.scheduler.min_lr)) == pytest.approx((rate, last), rel=1e-6)
    assert (optimizer.name, float(optimizer.weight_decay), optimizer.kwargs.momentum) == ("sgd", 1e-4, 0.9)
    assert not optimizer.get("exclude_bias_n_norm_wd", False) and float(cfg.scheduler.warmup_start_lr) == 3e-3
    assert (cfg.max_epochs, cfg.backbone.name, cfg.backbone.kwargs.zero_init_residual) == (epochs, backbone, True)
    names = ("proj_hidden_dim", "proj_output_dim", "proj_norm", "sim_weight", "covariance_momentum")
    assert tuple(given[name] for name in names) == options and given.mean_momentum == given.covariance_momentum
    assert [view.gaussian_blur.prob for view in cfg.augmentations] == [1.0, 0.1]
    assert [view.solarization.prob for view in cfg.augmentations] == [0, 0.2]
    assert all(view.rrc.crop_min_scale == 0.08 and view.horizontal_flip.prob == 0.5 for view in cfg.augmentations)


@pytest.mark.parametrize("name", ["byol", "directpred", "isoloss"])
def test_imagenet_settings(name, images):
    """100 epochs, learning rate 7.2 for 4096 images, half of them blurred."""
    cfg = parse_pretrain(load(Path("imagenet") / f"{name}.yaml", *local(images)[:-1], "++devices=4"))
    assert method_class(cfg).spec.name == name
    assert cfg.optimizer.lr * cfg.accumulate_grad_batches == pytest.approx(7.2)
    assert cfg.optimizer.classifier_lr * cfg.accumulate_grad_batches == pytest.approx(3.2)
    assert cfg.optimizer.weight_decay == {"byol": 1e-6}.get(name, 1e-5)
    assert (cfg.max_epochs, cfg.backbone.name, cfg.augmentations[0].crop_size) == (100, "resnet50", 224)
    assert [view.gaussian_blur.prob for view in cfg.augmentations] == [1.0, 0.1]


def test_the_overrides_of_cpc_v2_make_its_patches(images):
    """Those of the comment: the grid of v2 with whole patches, and colours in place of the grey patches of v1."""
    path = Path("imagenet/cpc.yaml")
    words = re.findall(r"\+\+[^\s']+", (ROOT / path).read_text())
    cfg = parse_pretrain(load(path, *words, *local(images)[:-1], "++devices=1"))
    (view,) = cfg.augmentations
    spec = METHODS["cpc"]
    options = spec.resolve(OmegaConf.to_container(cfg.method_kwargs))
    spec.check_patches(options, patches_of(view))
    assert (patches_of(view), offsets(options)) == ((36, 80, 36), [3, 4, 5])
    assert (options["context"], options["score"], options["directions"]) == ("pixelcnn", "projected", 4)
    assert (view.color_jitter.prob, view.grayscale.prob, view.grid.window) == (0.8, 0.25, 80)
    assert cfg.backbone.name == "resnet161_v2_stacks"


@pytest.mark.sample("digits/linear.yaml", "imagenet/linear_finetune.yaml")
@pytest.mark.parametrize("path", [path for path in COMPLETE if path not in SELF_SUPERVISED], ids=str)
def test_linear_evaluation_parses(path, images):
    cfg = parse_linear(load(path, "pretrained_feature_extractor=x", *local(images)))
    assert cfg.optimizer.lr > 0


@pytest.mark.sample("ema-isoloss-cifar", "none-directpred-stl10")
@pytest.mark.parametrize("folder", ["cifar", "stl10", "tinyimagenet"])
@pytest.mark.parametrize("method", ["byol", "directpred", "directcopy", "isoloss", "isocopy"])
@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_settings_of_the_isoloss_table(folder, method, teacher):
    cfg = load(Path(folder) / f"{method}.yaml", f"teacher={teacher}")
    OmegaConf.resolve(cfg)
    optimizer, options = cfg.optimizer, cfg.method_kwargs
    assert (optimizer.name, optimizer.lr) == {"ema": ("lars", 1.0), "none": ("sgd", 0.1)}[teacher]
    assert (optimizer.batch_size, optimizer.classifier_lr, cfg.max_epochs) == (256, 0.1, 1000)
    assert float(optimizer.weight_decay) == (1e-5 if method == "byol" else 1e-4)
    assert (cfg.momentum.base_tau, cfg.momentum.final_tau) == {"ema": (0.99, 1.0), "none": (0.0, 0.0)}[teacher]
    if method != "byol":
        powers = (1.0, 0.25) if method.endswith("copy") else (0.5, 0.0)
        assert (options.alpha, options.eps, options.rho) == (*powers, {"ema": 0.998, "none": 0.5}[teacher])
    size, blur = {"cifar": (32, [0, 0]), "stl10": (96, [1.0, 0.1]), "tinyimagenet": (64, [0, 0])}[folder]
    assert [view.crop_size for view in cfg.augmentations] == [size, size]
    assert [view.gaussian_blur.prob for view in cfg.augmentations] == blur
    assert [view.solarization.prob for view in cfg.augmentations] == [0, 0.2]
    assert all(view.rrc.crop_min_scale == 0.08 for view in cfg.augmentations)


@pytest.mark.parametrize("method", ["cissl", "dissl"])
def test_dissl_and_cissl_on_cifar_have_the_published_settings(method):
    cfg = load(Path("cifar") / f"{method}.yaml")
    OmegaConf.resolve(cfg)
    (views,) = cfg.augmentations
    jitter = views.color_jitter
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.2, 0.2, 0.2, 0.05)
    assert (views.num_crops, views.crop_size, views.rrc.crop_min_scale, views.grayscale.prob) == (2, 32, 0.2, 0.1)
    assert views.gaussian_blur.prob == views.solarization.prob == 0
    optimizer = cfg.optimizer
    assert (optimizer.name, optimizer.lr, float(optimizer.weight_decay)) == ("adam", 0.002, 1e-6)
    assert (cfg.max_epochs, cfg.gradient_clip_val, cfg.gradient_clip_algorithm) == (300, 2.0, "value")


@pytest.mark.parametrize("folder", ["cifar", "imagenet100"])
def test_settings_of_ssl_ey(folder):
    cfg = load(Path(folder) / "ssl_ey.yaml")
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.classifier_lr) == ("lars", 0.3, 0.1)
    assert (float(cfg.optimizer.weight_decay), cfg.optimizer.kwargs.eta) == (1e-4, 0.02)
    assert cfg.optimizer.batch_size * cfg.devices == 256
    assert cfg.max_epochs == {"cifar": 1000, "imagenet100": 400}[folder]
    (view,) = cfg.augmentations
    assert (view.num_crops, view.rrc.crop_min_scale, view.solarization.prob) == (2, 0.2, 0.1)
    assert view.gaussian_blur.prob == {"cifar": 0.0, "imagenet100": 0.5}[folder]


def test_no_projector_without_its_width_is_refused(images):
    cfg = parse_pretrain(
        load(Path("cifar/ssl_ey_no_projector.yaml"), *local(images), "++method_kwargs.proj_output_dim=8")
    )
    with pytest.raises(ValueError, match="without a projector proj_output_dim is that of the features, 512, got 8"):
        method_class(cfg)(cfg)


@pytest.mark.parametrize("name", ["matrix_ssl", "mec"])
@pytest.mark.parametrize("folder", ["imagenet", "imagenet100"])
def test_settings_of_matrix_ssl_and_mec(folder, name, images):
    """SGD with 0.5 for 256 images, 1e-5 on everything, an unequal pair of views, a teacher of 0.996."""
    cfg = parse_pretrain(load(Path(folder) / f"{name}.yaml", *local(images)[:-1]))
    assert cfg.optimizer.batch_size * cfg.devices == {"imagenet": 1024, "imagenet100": 256}[folder]
    assert cfg.optimizer.lr == pytest.approx({"imagenet": 2.0, "imagenet100": 0.5}[folder])
    assert (cfg.optimizer.name, float(cfg.optimizer.weight_decay)) == ("sgd", 1e-5)
    assert not cfg.optimizer.exclude_bias_n_norm_wd
    assert dict(cfg.optimizer.kwargs) == {"momentum": 0.9}
    assert (cfg.momentum.base_tau, cfg.momentum.final_tau) == (0.996, 1.0)
    assert [view.gaussian_blur.prob for view in cfg.augmentations] == [1.0, 0.1]
    assert [view.solarization.prob for view in cfg.augmentations] == [0.0, 0.2]
    assert all(view.rrc.crop_min_scale == 0.2 for view in cfg.augmentations)
    assert cfg.accumulate_grad_batches == 1
    if name == "mec":  # ten epochs
        images_in_all = {"imagenet": 1281167, "imagenet100": 126689}[folder]
        per_epoch = images_in_all // (cfg.optimizer.batch_size * cfg.devices)
        assert cfg.method_kwargs.warmup_iter == 10 * per_epoch


@pytest.mark.sample("200-mec")
@pytest.mark.parametrize("name", ["matrix_ssl", "mec"])
@pytest.mark.parametrize("epochs", [100, 200, 400])
def test_learning_rate_of_matrix_ssl_and_mec(name, epochs, images):
    """The rate rises from 0 to 2.0 at the last step of ten epochs, and falls to 0; an epoch has 1251 steps."""
    cfg = parse_pretrain(load(Path(f"imagenet/{name}.yaml"), *local(images)[:-1], f"max_epochs={epochs}"))
    assert cfg.scheduler.interval == "step"
    warm, total = 10 * 1251, epochs * 1251
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optimizer.lr)
    data = {"train_dataloader": [], "num_training_batches": 1251, "accumulate_grad_batches": 1}
    module = SimpleNamespace(trainer=SimpleNamespace(estimated_stepping_batches=total, **data))
    _, (described,) = with_schedule(module, optimizer, cfg.scheduler, {})
    assert (described["interval"], described["frequency"]) == ("step", 1)
    rate = {}
    for step in (0, 1, warm - 2, warm - 1, warm, warm + 1, (warm + total) // 2, total - 1):
        described["scheduler"].last_epoch = step
        (rate[step],) = described["scheduler"].get_lr()
    assert rate[0] == 0
    assert rate[1] == pytest.approx(2.0 / (warm - 1), rel=1e-12)
    assert rate[warm - 2] < rate[warm - 1] == pytest.approx(2.0, rel=1e-12)
    assert rate[warm + 1] < rate[warm] == pytest.approx(2.0, rel=1e-12)
    assert rate[(warm + total) // 2] == pytest.approx(1.0, rel=1e-4)
    assert 0 < rate[total - 1] < 1e-8


def test_exponential_and_reduced_learning_rates(images):
    """Both run once per epoch: a factor each time, and a factor after epochs in which the loss has not fallen."""
    module = SimpleNamespace()
    rates = {}
    for words in (
        ("exponential", "++scheduler.gamma=0.5"),
        ("reduce", "++scheduler.factor=0.2", "++scheduler.patience=1"),
    ):
        cfg = parse_linear(
            load(
                Path("digits/linear.yaml"),
                *local(images),
                f"scheduler.name={words[0]}",
                "pretrained_feature_extractor=x",
                *words[1:],
            )
        )
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        (_,), (described,) = with_schedule(module, optimizer, cfg.scheduler, {})
        found = rates.setdefault(words[0], [])
        for loss in (3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.5):
            optimizer.step()
            if isinstance(described, dict):
                assert (described["interval"], described["monitor"]) == ("epoch", "train_loss")
                described["scheduler"].step(loss)
            else:
                described.step()
            found.append(round(optimizer.param_groups[0]["lr"], 6))
    assert rates["exponential"] == [0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625]
    assert rates["reduce"] == [0.8, 0.8, 0.8, 0.16, 0.16, 0.16, 0.032]


def _further_words(name: str) -> list[str]:
    """The overrides of the other published run that a comment of the file gives."""
    (words,) = re.findall(r"^# .*: (\S+=\S+ .*=\S+)$", (ROOT / "imagenet" / name).read_text(), re.MULTILINE)
    return words.split()


def _published(method: str, images: Path, *words: str) -> DictConfig:
    """The configuration of a method on ImageNet, as on its GPUs."""
    cfg = load(Path("imagenet") / f"{method}.yaml", *words)
    devices = f"++devices={cfg.devices}"
    return parse_pretrain(load(Path("imagenet") / f"{method}.yaml", *words, *local(images)[:-1], devices))


_CROPS = {
    "moco": [(224, 2, 0.2, 1)],
    "swav": [(224, 2, 0.14, 1), (96, 6, 0.05, 0.14)],
    "seer": [(224, 2, 0.14, 1), (96, 4, 0.05, 0.14)],
    "dino": [(224, 1, 0.14, 1), (224, 1, 0.14, 1), (96, 8, 0.05, 0.14)],
    "simdino": [(224, 1, 0.4, 1), (224, 1, 0.4, 1), (96, 10, 0.05, 0.4)],
    "sela": [(224, 1, 0.08, 1)],
    "deepcluster": [(224, 1, 0.08, 1)],
    "deepcluster_v2": [(224, 2, 0.14, 1), (96, 6, 0.05, 0.14)],
}


@pytest.mark.parametrize(
    ("method", "batch", "epochs", "rates", "optimizer", "decay", "tau"),
    [
        ("moco", 256, 200, (None, 0.03, 0), "sgd", 1e-4, (0.999, 0.999)),
        ("swav", 4096, 800, (0.3, 4.8, 0.0048), "lars", 1e-6, None),
        ("seer", 8192, 100, (0.15, 9.6, 0.0096), "lars", 1e-5, None),
        ("dino", 512, 100, (0, 0.06, 1e-6), "sgd", 1e-4, (0.996, 1)),
        ("simdino", 512, 100, (0, 1e-3, 1e-6), "adamw", 0.04, (0.996, 1)),
        ("sela", 256, 400, ("step", 0.08, None), "sgd", 1e-5, None),
        ("deepcluster", 256, 200, ("none", 0.05, None), "sgd", 1e-5, None),
        ("deepcluster_v2", 4096, 800, (0.3, 4.8, 0.0048), "lars", 1e-6, None),
    ],
)
def test_published_settings_on_imagenet(method, batch, epochs, rates, optimizer, decay, tau, images):
    cfg = _published(method, images)
    assert method_class(cfg).spec.name == method
    assert cfg.optimizer.batch_size * cfg.devices * cfg.num_nodes * cfg.accumulate_grad_batches == batch
    first, peak, last = rates
    if isinstance(first, str):  # not a cosine
        assert cfg.scheduler.name == first
        assert first == "none" or [*cfg.scheduler.lr_decay_steps] == [150, 300, 350]
    else:
        assert cfg.scheduler.warmup_epochs == (0 if first is None else 10)
        assert first is None or cfg.scheduler.warmup_start_lr == first
        assert cfg.scheduler.min_lr == last
    assert cfg.optimizer.lr == pytest.approx(peak)
    assert (cfg.optimizer.name, float(cfg.optimizer.weight_decay), cfg.max_epochs) == (optimizer, decay, epochs)
    assert optimizer in ("sgd", "adamw") or not cfg.optimizer.kwargs.exclude_bias_n_norm
    assert tau is None or (cfg.momentum.base_tau, cfg.momentum.final_tau) == tau
    crops = [(v.crop_size, v.num_crops, v.rrc.crop_min_scale, v.rrc.crop_max_scale) for v in cfg.augmentations]
    assert crops == _CROPS[method]
    assert cfg.backbone.name == {"seer": "regnet_y_32gf", "simdino": "vit_base"}.get(method, "resnet50")


def test_other_published_runs_are_those_of_the_comments(images):
    """SwAV with 256 images a step and a queue; SEER on a stream of a billion images."""
    cfg = _published("swav", images, *_further_words("swav.yaml"))
    assert cfg.optimizer.batch_size * cfg.devices * cfg.num_nodes == 256
    assert (cfg.optimizer.lr, cfg.scheduler.min_lr, cfg.scheduler.warmup_epochs) == (0.6, 0.0006, 0)
    options = method_class(cfg).spec.resolve(OmegaConf.to_container(cfg.method_kwargs))
    assert (options["queue_size"], options["queue_epoch"], options["freeze_prototypes_steps"]) == (3840, 15, 5005)
    words = [word.replace("FOLDER", str(images / "train")) for word in _further_words("seer.yaml")]
    cfg = load(Path("imagenet/seer.yaml"), *words, "++accelerator=cpu", "++devices=8")
    cfg = parse_pretrain(cfg)
    assert (cfg.data.no_labels, cfg.max_epochs, cfg.max_steps) == (True, 1, 10**9 // 8192)
    assert cfg.scheduler.warmup_epochs * cfg.max_steps == pytest.approx(8000, rel=1e-3)
    assert cfg.optimizer.lr == pytest.approx(9.6)


def test_the_backbone_has_a_learning_rate_of_its_own(images):
    """VICReg's evaluate.py: 0.3 and 0, for 256 images; with fine-tuning the README's two rates."""
    words = ("pretrained_feature_extractor=x", *local(images)[:-1])
    cfg = parse_linear(load(Path("imagenet/linear.yaml"), *words))
    assert (cfg.optimizer.lr, cfg.optimizer.backbone_lr, cfg.finetune) == (0.3, 0.0, False)
    assert cfg.optimizer.batch_size * cfg.devices == 256
    assert (cfg.optimizer.name, cfg.optimizer.weight_decay, dict(cfg.optimizer.kwargs)) == (
        *("sgd", 1e-6, {"momentum": 0.9}),
    )
    assert (cfg.scheduler.interval, cfg.scheduler.warmup_epochs, cfg.max_epochs) == ("epoch", 0, 100)
    further = _further_words("linear.yaml")
    cfg = parse_linear(load(Path("imagenet/linear.yaml"), *words, *further, "optimizer.batch_size=64"))
    assert (cfg.optimizer.lr, cfg.optimizer.backbone_lr) == (0.16, 0.06)
    assert (cfg.optimizer.weight_decay, cfg.max_epochs) == (0, 20)
    network = torch.nn.Sequential(torch.nn.Linear(2, 3))
    network.num_features = 3
    for finetune, rates in ((True, [(2, 0.16), (2, 0.06)]), (False, [(2, 0.16)])):
        cfg.finetune, cfg.scheduler.name = finetune, "none"
        optimizer = LinearModel(network, cfg).configure_optimizers()
        assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == rates
    with pytest.raises(UserError, match=r"optimizer\.backbone_lr and optimizer\.layer_decay exclude each other"):
        parse_linear(load(Path("imagenet/linear.yaml"), *words, "++optimizer.layer_decay=0.5"))


def test_settings_of_the_linear_evaluation_on_imagenet(images):
    cfg = parse_linear(
        load(Path("imagenet/linear_normalized.yaml"), "pretrained_feature_extractor=x", *local(images)[:-1])
    )
    assert cfg.optimizer.batch_size * cfg.devices == 4096
    assert cfg.optimizer.lr == pytest.approx(0.48)
    wanted = {"momentum": 0.9, "eta": 0.001, "clip_lr": False, "exclude_bias_n_norm": False}
    assert (cfg.optimizer.name, dict(cfg.optimizer.kwargs), cfg.optimizer.weight_decay) == ("lars", wanted, 0)
    assert (cfg.scheduler.interval, cfg.scheduler.warmup_epochs, cfg.max_epochs) == ("epoch", 0, 100)
    assert cfg.normalized_classifier


def test_the_steps_of_amdim_have_a_warm_up_and_a_factor_of_their_own(images):
    """(k + 1) / 500 in step k, and a fifth from epoch 251 on, and again from epoch 281 on."""
    cfg = parse_pretrain(load(Path("cifar/amdim.yaml"), *local(images)))
    assert cfg.optimizer.lr == pytest.approx(2e-4)
    assert list(cfg.optimizer.kwargs.betas) == [0.8, 0.999]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optimizer.lr)
    _, (by_epoch, by_step) = with_schedule(None, optimizer, cfg.scheduler, {})
    assert (by_step["interval"], by_step["frequency"]) == ("step", 1)
    rates, steps_per_epoch = [], 2
    for step in range(2 * 300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        by_step["scheduler"].step()
        if step % steps_per_epoch == steps_per_epoch - 1:
            by_epoch.step()
    for step, factor in ((0, 1 / 500), (1, 2 / 500), (498, 499 / 500), (501, 1), (502, 0.2), (561, 0.2), (562, 0.04)):
        assert rates[step] == pytest.approx(2e-4 * factor), step
    with_rate = with_schedule(None, optimizer, load(Path("cifar/amdim.yaml"), "scheduler.warmup_steps=0").scheduler, {})
    assert len(with_rate[1]) == 1


def test_entries_of_a_fork_are_announced_and_ignored(images, capsys):
    """Those of Rectified LpJEPA's files; another method has no such entries."""
    entries = (
        *("++mlp_probe.enabled=False", "++mlp_probe.num_layers=3", "++data.preload=True"),
        *("++method_kwargs.add_projector_classifier=true", "++method_kwargs.logging_interval=50"),
    )
    cfg = parse_pretrain(load(Path("cifar/rectified_lpjepa.yaml"), *entries, *local(images)))
    assert method_class(cfg).spec.name == "rectified_lpjepa"
    told = [
        line.partition(" is ignored: ")[0] for line in capsys.readouterr().out.splitlines() if " is ignored" in line
    ]
    names = ["data.preload", "method_kwargs.add_projector_classifier", "method_kwargs.logging_interval", "mlp_probe"]
    assert sorted(told) == names
    with pytest.raises(UserError, match="mlp_probe"):
        parse_pretrain(load(Path("cifar/lejepa.yaml"), *entries[:2], *local(images)))
