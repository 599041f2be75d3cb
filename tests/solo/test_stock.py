"""solo-learn's unmodified scripts run our methods, and solo-learn's tests still pass."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from torchvision import transforms as T

from plugins.tools.command import UserError
from solo_ext import main_pretrain, stock
from solo_ext.checkpoint import find_checkpoint
from solo_ext.compat import CHECKOUT, GENERATION, native_methods
from solo_ext.registry import plugin_methods
from solo_ext.transforms import DATASETS

pytestmark = pytest.mark.solo
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "solo" / "digits"


# what the scripts are given


@pytest.fixture
def scripts(checkout, monkeypatch):
    """The modules of the scripts, with us in them until the test ends."""
    import solo.args.linear
    import solo.args.pretrain
    import solo.data.classification_dataloader as classification
    import solo.data.dali_dataloader as dali
    import solo.data.pretrain_dataloader as pretrain
    import solo.methods

    changed = [
        *(
            (module, name)
            for module in (pretrain, classification)
            for name in ("prepare_datasets", "prepare_transforms")
        ),
        *((module, "parse_cfg") for module in (solo.args.pretrain, solo.args.linear)),
        *((builder, "pipeline") for builder in (dali.NormalPipelineBuilder, dali.PretrainPipelineBuilder)),
    ]
    for holder, name in changed:
        if hasattr(holder, name):
            monkeypatch.setattr(holder, name, getattr(holder, name))
    for module in (solo.args.pretrain, solo.args.linear):
        monkeypatch.setattr(module, "_SUPPORTED_DATASETS", list(module._SUPPORTED_DATASETS))
        monkeypatch.setattr(module, "_N_CLASSES_PER_DATASET", dict(module._N_CLASSES_PER_DATASET))
    monkeypatch.setattr(solo.methods, "METHODS", dict(solo.methods.METHODS))
    stock.activate()
    return solo


@pytest.fixture
def compose(compose):
    """A configuration as the scripts hand it on: keys can be added."""

    def build(*args: str):
        cfg = compose(*args)
        OmegaConf.set_struct(cfg, False)
        return cfg

    return build


@pytest.mark.parametrize(("devices", "count"), [("1", 1), ("2", 2), ("[0]", 1), ("[0,1]", 2), ("'2'", 2), ("'0,1'", 2)])
def test_learning_rate_grows_with_the_devices_however_they_are_written(devices, count, scripts, compose):
    cfg = scripts.args.pretrain.parse_cfg(compose("isoloss", f"devices={devices}", "optimizer.lr=0.8"))
    assert cfg.devices == count  # on a CPU Lightning takes a number alone
    assert cfg.optimizer.lr == pytest.approx(0.8 * 32 * count / 256)
    cfg = compose("linear", f"devices={devices}", "optimizer.lr=0.8", "pretrained_feature_extractor=a.ckpt")
    cfg = scripts.args.linear.parse_cfg(cfg)
    assert cfg.devices == count
    assert cfg.optimizer.lr == pytest.approx(0.8 * 32 * count / 256)


def test_options_choose_between_our_byol_and_solo_learns(scripts, compose):
    ours = compose("byol", "+method_kwargs.use_l2=true")
    scripts.args.pretrain.parse_cfg(ours)
    assert scripts.methods.METHODS["byol"] is plugin_methods()["byol"]
    own = compose("byol")
    own.method_kwargs = {"proj_hidden_dim": 32, "proj_output_dim": 16, "pred_hidden_dim": 32}
    scripts.args.pretrain.parse_cfg(own)
    assert scripts.methods.METHODS["byol"] is native_methods()["byol"]


def test_solo_learns_own_files_are_completed_as_its_own_classes_do(scripts, checkout, digits):
    """The script reads entries that main's classes used to fill in."""
    with initialize_config_dir(str(checkout / "scripts" / "pretrain" / "cifar"), version_base="1.2"):
        cfg = hydra_compose("simsiam", ["data.dataset=custom", f"data.train_path={digits / 'train'}"])
    OmegaConf.set_struct(cfg, False)
    cfg = scripts.args.pretrain.parse_cfg(cfg)
    assert cfg.performance.disable_channel_last is False
    assert scripts.methods.METHODS["simsiam"] is native_methods()["simsiam"]


def test_the_forks_name_of_a_method_is_known(scripts, compose):
    cfg = compose("ssl_ey", "method=ssley")
    assert scripts.args.pretrain.parse_cfg(cfg).method in scripts.methods.METHODS
    assert scripts.methods.METHODS["ssley"] is plugin_methods()["ssl_ey"]


_REFUSED = {
    "misspelt option": (["+method_kwargs.alhpa=1"], "method isoloss has no option 'alhpa'; known options: alpha"),
    "unknown method": (["method=isolos"], "unknown method 'isolos'; choose from"),
    "one view": (["augmentations.0.num_crops=1"], "augmentations: method isoloss needs at least two views, got 1"),
    "missing images": (["data.train_path=nowhere"], "data.train_path is not a folder: nowhere (create it with"),
    "devices": (["devices=many"], "devices must be a number above 0 or a list of indexes, got 'many'"),
    "no device": (["devices=0"], "devices must be a number above 0 or a list of indexes, got 0"),
    "flip of all views": (
        ["+shared_flip=0.5"],
        "shared_flip is not available in solo-learn's own script; run the same",
    ),
    "steps of a view": (
        ["+augmentations.0.translate={prob:0.8,pixels:1}", "+augmentations.0.photometric.prob=0.5"],
        "augmentations.0.translate, augmentations.0.photometric are not available in solo-learn's own script",
    ),
    "interpolation": (["seed=${nothing}"], "the configuration does not resolve"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_a_mistake_is_one_sentence_and_status_2(case, scripts, compose, capfd):
    more, sentence = _REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        scripts.args.pretrain.parse_cfg(compose("isoloss", *more))
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and f"error: {sentence}" in said


def test_methods_whose_input_the_script_does_not_make_are_refused(scripts, compose, capfd, monkeypatch):
    with pytest.raises(SystemExit):
        scripts.args.pretrain.parse_cfg(compose("pirl"))
    assert "error: solo-learn's own script cannot make stacks of patches; run the same con" in capfd.readouterr().err
    plugin = plugin_methods()["isoloss"]
    indexed = type("Indexed", (plugin,), {"spec": replace(plugin.spec, indexed=True)})
    monkeypatch.setitem(plugin_methods(), "isoloss", indexed)
    scripts.args.pretrain.parse_cfg(compose("isoloss"))
    with pytest.raises(SystemExit):
        scripts.args.pretrain.parse_cfg(compose("isoloss", "data.format=dali", "data.dataset=custom"))
    assert "error: method isoloss needs the positions of the images in the training" in capfd.readouterr().err


def test_small_crops_before_large_views_are_refused(scripts, compose, capfd):
    crop = "{rrc:{enabled:true,crop_min_scale:0.1,crop_max_scale:1.0},crop_size:%d,num_crops:2}"
    with pytest.raises(SystemExit) as stopped:
        scripts.args.pretrain.parse_cfg(compose("dissl", f"augmentations=[{crop % 8},{crop % 16}]"))
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and "error: augmentations: large views come first" in said


def _normalization(transform: T.Compose) -> tuple[list[float], list[float]]:
    (step,) = [step for step in transform.transforms if isinstance(step, T.Normalize)]
    return list(step.mean), list(step.std)


def test_digits_are_augmented_and_evaluated_as_by_our_command(scripts, compose, digits):
    from solo.data.classification_dataloader import prepare_data
    from solo.data.pretrain_dataloader import build_transform_pipeline, prepare_datasets

    info = DATASETS["digits"]
    statistics = (list(info.mean), list(info.std))
    cfg = scripts.args.pretrain.parse_cfg(compose("isoloss"))
    assert cfg.data.num_classes == 10
    view = build_transform_pipeline("digits", cfg.augmentations[0])
    assert _normalization(view) == statistics
    index, image, label = prepare_datasets("digits", view, train_data_path=cfg.data.train_path)[95]
    assert (index, image.shape, label) == (95, (3, 16, 16), 9)

    cfg = compose("linear", "pretrained_feature_extractor=a.ckpt", "data.augmentations.crop_min_scale=0.7")
    cfg = scripts.args.linear.parse_cfg(cfg)
    train, val = prepare_data("digits", train_data_path=cfg.data.train_path, val_data_path=cfg.data.val_path)
    crop = train.dataset.transform.transforms[0]
    assert (crop.size, crop.scale) == ((16, 16), (0.7, 1.0))
    assert not any(isinstance(step, T.RandomHorizontalFlip) for step in train.dataset.transform.transforms)
    for loader in (train, val):
        assert _normalization(loader.dataset.transform) == statistics
    assert val.dataset[0][0].shape == (3, 16, 16)


def test_every_data_set_of_ours_is_known_to_both_scripts(scripts):
    for module in (scripts.args.pretrain, scripts.args.linear):
        assert set(DATASETS) == set(module._SUPPORTED_DATASETS)
        assert all(module._N_CLASSES_PER_DATASET.get(name) == info.classes for name, info in DATASETS.items())


def test_a_linear_evaluation_on_cifar_has_the_stem_of_its_pre_training(scripts, compose):
    more = ("pretrained_feature_extractor=a.ckpt", "data.dataset=cifar10", "backbone.name=resnext50")
    cfg = scripts.args.linear.parse_cfg(compose("linear", *more))
    assert cfg.backbone.kwargs == {"cifar": True}


@pytest.mark.skipif(GENERATION == "main", reason="for a process with solo-learn 1.0.2")
def test_1_0_2_has_no_scripts_to_extend():
    with pytest.raises(UserError, match="has no scripts to extend"):
        stock.activate()


def test_other_programs_of_hydra_pay_nothing():
    """VISSL's, for one: they find our module among the plugins."""
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists(), "hydra_plugins belongs to all packages in common"
    code = (
        "import sys; from hydra.core.plugins import Plugins; Plugins.instance();"
        "assert 'hydra_plugins.solo_ext_plugin' in sys.modules, 'not found';"
        "assert not {'solo', 'solo_ext', 'torch', 'lightning'} & set(sys.modules)"
    )
    _run(["-c", code], ROOT)


# the scripts themselves


def _run(argv: list[str], cwd: Path, checkout: Path | None = None) -> str:
    """Run Python as a user of a checkout does, without our environment variable; return the output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path) for path in (checkout, ROOT) if path])}
    environment.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    environment.pop(CHECKOUT, None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def _arguments(name: str, digits: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--config-path", str(CONFIGS), "--config-name", name, f"++checkpoint.dir={out}"),
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"),
        *("++check_val_every_n_epoch=1", "++checkpoint.frequency=1", "+enable_progress_bar=false", *more),
    ]


def _checkpoint(folder: Path) -> Path:
    (found,) = folder.rglob("*.ckpt")
    return found


_SAME_EACH_TIME = [
    *("augmentations.0.rrc.enabled=false", "augmentations.0.color_jitter.prob=0", "augmentations.0.grayscale.prob=0"),
    *("optimizer.batch_size=96", "optimizer.name=sgd", "optimizer.lr=2e-4", "max_epochs=3"),
    *("scheduler.warmup_epochs=1", "method_kwargs.proj_hidden_dim=64", "method_kwargs.proj_output_dim=32"),
]
"""All images in one batch, without augmentation, so that the order of the images, which differs, has no effect."""


@pytest.mark.slow
def test_stock_script_trains_our_byol_to_the_weights_of_our_command(checkout, digits, tmp_path, monkeypatch):
    """Class, images, learning rate, schedule and teacher are the same: so are the weights after three steps."""
    more = [*_SAME_EACH_TIME, "+method_kwargs.use_l2=true", "devices=1"]
    script = [str(checkout / "main_pretrain.py"), *_arguments("byol.yaml", digits, tmp_path / "stock", *more)]
    _run(script, tmp_path)
    theirs = torch.load(_checkpoint(tmp_path / "stock"), weights_only=True)
    assert theirs["global_step"] == 3

    argv = _arguments("byol.yaml", digits, tmp_path / "ours", *more, "++checkpoint.version=v")
    monkeypatch.setattr(sys, "argv", ["main_pretrain", *argv])
    main_pretrain.main()
    ours = torch.load(find_checkpoint(tmp_path / "ours" / "byol" / "v"), weights_only=True)
    assert theirs["state_dict"].keys() == ours["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    moved = ours["state_dict"]["backbone.bn1.bias"]  # 0 at the start
    assert moved.abs().max() > 1e-4

    more = (f"pretrained_feature_extractor='{_checkpoint(tmp_path / 'stock')}'", "max_epochs=1")
    script = [str(checkout / "main_linear.py"), *_arguments("linear.yaml", digits, tmp_path / "linear", *more)]
    _run(script, tmp_path)
    linear = torch.load(_checkpoint(tmp_path / "linear"), weights_only=True)["state_dict"]
    backbone = [name for name in linear if name.startswith("backbone.")]
    assert backbone and all(torch.equal(linear[name], theirs["state_dict"][name]) for name in backbone)


@pytest.mark.slow
def test_stock_script_trains_in_two_processes(checkout, digits, tmp_path):
    more = ("devices=2", "+strategy=ddp", "optimizer.batch_size=24", "max_epochs=1", "optimizer.lr=0.8")
    small = ("method_kwargs.proj_hidden_dim=64", "method_kwargs.proj_output_dim=32")
    script = [str(checkout / "main_pretrain.py"), *_arguments("isoloss.yaml", digits, tmp_path / "out", *more, *small)]
    _run(script, tmp_path)
    checkpoint = torch.load(_checkpoint(tmp_path / "out"), weights_only=True)
    assert checkpoint["global_step"] == 96 // (2 * 24)
    assert checkpoint["state_dict"]["predictor.C"].shape == (32, 32)  # solo-learn has no such predictor
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    args = json.loads(next((tmp_path / "out").rglob("args.json")).read_text())
    assert args["optimizer"]["lr"] == pytest.approx(0.8 * 2 * 24 / 256)


# solo-learn's own tests

_NEEDS_NETWORK = "downloads CIFAR-10"
_SLOW = "half a minute or more, and of nothing that we change"
LEFT_OUT = {
    "data/test_classification_dataloader.py::test_datasets": _NEEDS_NETWORK,
    "data/test_classification_dataloader.py::test_data": _NEEDS_NETWORK,
    "data/test_pretrain_dataloader.py::test_data": _NEEDS_NETWORK,
    "utils/test_auto_umap.py": "needs seaborn, which solo-learn's script for UMAP alone uses",
    "backbones/test_backbones.py": _SLOW,
    "methods/test_mae.py": _SLOW,
    "methods/test_simclr.py": _SLOW,
    "methods/test_supcon.py": _SLOW,
}


@pytest.mark.slow
def test_main_passes_its_own_tests_with_us_in_it(checkout, tmp_path):
    """Two fail without us: of the k-NN classifier, and, where there is no GPU, of DALI."""
    (tmp_path / "with_us.py").write_text("from solo_ext.stock import activate\n\nactivate()\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    left_out = []
    for name in LEFT_OUT:
        assert (checkout / "tests" / name.split("::")[0]).is_file(), name
        left_out += ["--deselect", name] if "::" in name else ["--ignore", str(checkout / "tests" / name)]
    argv = ["-m", "pytest", str(checkout / "tests"), *("-p", "no:cacheprovider", "-p", "with_us")]
    said = _run([*argv, "--rootdir", str(tmp_path), "-c", "pytest.ini", "-q", *left_out], tmp_path, checkout)
    assert " passed" in said and " failed" not in said
