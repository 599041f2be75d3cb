"""The folder of a run: a run with the same settings is resumed there, another one is an error."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vissl.models import base_ssl_model

import vissl_ext  # noqa: F401  (the shims)
from plugins.tools.command import UserError
from vissl_ext.compose import compose
from vissl_ext.identity import check_same, run_settings, write_settings
from vissl_ext.launch import prepare

pytestmark = pytest.mark.vissl

DIGITS = Path("datasets/digits/train").absolute()


def config_of(*overrides: str):
    return compose(["config=pretrain/isoloss/digits", *overrides], [])[0].config


def claimed(folder: Path, *overrides: str, engine: str = "train") -> dict[str, Any]:
    ours = run_settings(engine, config_of(*overrides))
    check_same(folder, ours)
    write_settings(folder, ours)
    return ours


@pytest.mark.slow
def test_the_same_run_may_go_on_with_more_epochs_and_on_another_machine(tmp_path: Path) -> None:
    claimed(tmp_path)
    (tmp_path / "model_phase1.torch").touch()
    more = run_settings("train", config_of("config.OPTIMIZER.num_epochs=99"))
    assert check_same(tmp_path, more) == 10
    claimed(
        tmp_path,
        *("config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32"),
        *("config.MACHINE.DEVICE=gpu", "config.MODEL.AMP_PARAMS.USE_AMP=true", "config.DATA.NUM_DATALOADER_WORKERS=9"),
        *("config.LOG_FREQUENCY=1", "config.CHECKPOINT.CHECKPOINT_FREQUENCY=9", "config.DATA.TEST.DATA_PATHS=[other]"),
    )


@pytest.mark.sample("SimCLR")
@pytest.mark.parametrize("method", ["SimCLR", "SwAV", "DeepCluster v2"])
def test_what_vissl_derives_for_a_loss_from_the_processes_and_the_folder_is_not_compared(
    method: str, stock_commands: dict, tmp_path: Path
) -> None:
    def begin(folder: Path, processes: int, batch: int) -> None:
        words = [*stock_commands[method](folder, 1), f"config.DISTRIBUTED.NUM_PROC_PER_NODE={processes}"]
        prepare([*words, f"config.DATA.TRAIN.BATCHSIZE_PER_REPLICA={batch}", "config.OPTIMIZER.num_epochs=1"], [])

    begin(tmp_path / "here", 2, 4)
    shutil.move(tmp_path / "here", tmp_path / "moved")
    torch.save({}, tmp_path / "moved" / "model_phase0.torch")
    path = tmp_path / "moved" / "run.json"
    written = json.loads(path.read_text())
    (section,) = [value for key, value in written.items() if key.startswith("config.LOSS.") and key[-5:] == "_loss"]
    section.update(output_dir="elsewhere", world_size=3)  # as earlier releases wrote
    path.write_text(json.dumps(written))
    begin(tmp_path / "moved", 1, 8)


@pytest.mark.sample("config.SEED_VALUE=9-*")
@pytest.mark.parametrize(
    ("override", "name", "there", "here"),
    [
        ("config.LOSS.isoloss.rho=0.5", "config.LOSS.isoloss.rho", 0.99, 0.5),
        ("config.SEED_VALUE=9", "config.SEED_VALUE", 5, 9),
        ("config.MODEL.TRUNK.RESNETS.DEPTH=34", "config.MODEL.TRUNK.RESNETS.DEPTH", 8, 34),
        ("config.MODEL.HEAD.BATCHNORM_EPS=1", "config.MODEL.HEAD.BATCHNORM_EPS", 1e-05, 1),
        ("config.MODEL.GRAD_CLIP.USE_GRAD_CLIP=true", "config.MODEL.GRAD_CLIP.USE_GRAD_CLIP", False, True),
        ("config.MODEL.WEIGHTS_INIT.PARAMS_FILE=a", "config.MODEL.WEIGHTS_INIT.PARAMS_FILE", "", "a"),
        ("config.OPTIMIZER.weight_decay=3", "config.OPTIMIZER.weight_decay", 0.01, 3),
        (
            "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling.base_value=3.0",
            "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling.base_value",
            *(0.008, 3.0),
        ),
        ("config.DATA.TRAIN.DATA_LIMIT=7", "config.DATA.TRAIN.DATA_LIMIT", -1, 7),
        ("config.DATA.TRAIN.LABEL_SOURCES=[disk_folder]", "config.DATA.TRAIN.LABEL_SOURCES", [], ["disk_folder"]),
        ("config.DATA.TRAIN.DATA_PATHS=[/other]", "config.DATA.TRAIN.DATA_PATHS.0", str(DIGITS), "/other"),
        ("config.DATA.TRAIN.TRANSFORMS.1.size=9", "config.DATA.TRAIN.TRANSFORMS.1.size", 16, 9),
        (
            "config.DATA.TRAIN.COLLATE_FUNCTION=simclr_collator",
            "config.DATA.TRAIN.COLLATE_FUNCTION",
            *("multicrop_collator", "simclr_collator"),
        ),
        (
            "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8",
            "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA of all processes",
            64,
            8,
        ),
        ("config.DISTRIBUTED.NUM_NODES=2", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA of all processes", 64, 128),
        ("config.TEST_MODEL=true", "config.TEST_MODEL", False, True),
        (None, "engine_name", "train", "knn"),
    ],
)
def test_another_run_raises_an_error_if_there_are_checkpoints(tmp_path, override, name, there, here) -> None:
    claimed(tmp_path)
    before = (tmp_path / "run.json").read_text()
    (tmp_path / "model_final_checkpoint_phase1.torch").touch()
    words, engine = [override] if override else [], "train" if override else "knn"
    with pytest.raises(UserError, match=re.escape(f"a run with {name}={there}, this one has {here}; set {name}=")):
        claimed(tmp_path, *words, engine=engine)
    assert (tmp_path / "run.json").read_text() == before
    (tmp_path / "model_final_checkpoint_phase1.torch").unlink()
    (tmp_path / "model_of_my_own.torch").touch()
    claimed(tmp_path, *words, engine=engine)
    assert (tmp_path / "run.json").read_text() != before


def test_a_run_with_fewer_recorded_settings_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config.LOSS.name": "isoloss", "config.OPTIMIZER.name": "adamw"}')
    (tmp_path / "model_phase1.torch").touch()
    assert check_same(tmp_path, run_settings("train", config_of("config.SEED_VALUE=9"))) is None
    with pytest.raises(UserError, match=r"config\.OPTIMIZER\.name=adamw, this one has sgd"):
        claimed(tmp_path, "config.OPTIMIZER.name=sgd")


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]"])
def test_an_invalid_record_is_a_one_line_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "model_phase1.torch").touch()
    with pytest.raises(UserError, match=r"/run\.json (is not valid JSON|was not written by this launcher)") as error:
        check_same(tmp_path, {})
    assert "\n" not in str(error.value)


def test_a_folder_without_classes_is_the_folder_of_the_run(few_digits: Path, tmp_path: Path) -> None:
    """Its images are read from a list in the run's folder."""
    for name in ("one", "two"):
        shutil.copytree(few_digits / "train" / "0", tmp_path / name)
    for name in ("one", "two"):
        words = [f"config.DATA.TRAIN.DATA_PATHS=[{tmp_path}/{name}]", f"config.CHECKPOINT.DIR={tmp_path}/run"]
        if name == "two":
            torch.save({}, tmp_path / "run" / "model_phase3.torch")
            message = re.escape(f"config.DATA.TRAIN.DATA_PATHS.0={tmp_path}/one, this one has {tmp_path}/two; set")
            with pytest.raises(UserError, match=message):
                prepare(["config=pretrain/isoloss/digits", *words], [])
        else:
            prepare(["config=pretrain/isoloss/digits", *words], [])


def test_another_method_does_not_touch_a_finished_run(few_digits: Path, tmp_path: Path) -> None:
    data = f"config.DATA.TRAIN.DATA_PATHS=[{few_digits}/train]"
    words = [data, f"config.CHECKPOINT.DIR={tmp_path}"]
    prepare(["config=pretrain/isoloss/digits", *words], [])
    written = (tmp_path / "train_config.yaml").read_text()
    torch.save({}, tmp_path / "model_final_checkpoint_phase19.torch")
    with pytest.raises(UserError, match=r"contains a run with config\.LOSS\.name=isoloss, this one has byol"):
        prepare(["config=pretrain/byol/digits", *words], [])
    prepare(["config=pretrain/isoloss/digits", *words, "config.OPTIMIZER.num_epochs=3"], [])
    assert (tmp_path / "train_config.yaml").read_text() == written
    assert json.loads((tmp_path / "run.json").read_text())["config.LOSS.name"] == "isoloss"


def test_each_method_has_a_folder_of_its_own() -> None:
    folders = {compose([f"config=pretrain/{name}/digits"], [])[0].config.CHECKPOINT.DIR for name in ("byol", "isoloss")}
    assert folders == {"trained_models/vissl/digits/byol", "trained_models/vissl/digits/isoloss"}


def test_unlabelled_images_are_enough_for_our_methods(few_digits: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(few_digits.glob("train/*/*.png"))[:4]:
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    for name in ("digits", "cifar"):
        words = [f"config.DATA.TRAIN.DATA_PATHS=[{flat}]", f"config.CHECKPOINT.DIR={tmp_path / name}"]
        config = prepare([f"config=pretrain/isoloss/{name}", *words], [])[1]
        assert config.DATA.TRAIN.DATA_SOURCES == ["disk_filelist"]


def test_a_checkpoint_of_another_trunk_raises_an_error(tmp_path: Path) -> None:
    """VISSL leaves what it does not find at random."""

    class Model(torch.nn.Module):
        def __init__(self, **layers: torch.nn.Module) -> None:
            super().__init__()
            self.trunk = torch.nn.ModuleDict(layers)

    def checkpoint(model: Model) -> dict:
        trunk = {key.removeprefix("trunk."): value for key, value in model.state_dict().items()}
        parts = {"trunk": trunk, "heads": {}}
        return {"classy_state_dict": {"base_model": {"model": parts}}}

    config = config_of("config.MODEL.WEIGHTS_INIT.PARAMS_FILE=weights.torch")
    small, large = Model(a=torch.nn.Linear(2, 3)), Model(a=torch.nn.Linear(2, 3), b=torch.nn.Linear(3, 3))
    how = {"state_dict_key_name": "classy_state_dict", "skip_layers": [], "replace_prefix": None, "append_prefix": None}
    load = base_ssl_model.init_model_from_consolidated_weights
    for model, state in ((large, small), (small, large)):
        load.__wrapped__(config, model, checkpoint(state), **how)  # if this raises, VISSL checks it itself
    other = r"weights\.torch is a checkpoint of another trunk .*: "
    with pytest.raises(UserError, match=other + r"missing b\.weight and 1 more\. It is probably"):
        load(config, large, checkpoint(small), **how)
    with pytest.raises(UserError, match=other + r"unexpected b\.weight and 1 more\. It is probably"):
        load(config, small, checkpoint(large), **how)
    config.MODEL.WEIGHTS_INIT.PARAMS_FILE = str(tmp_path / "weights.torch")
    trunk = {"config.MODEL.TRUNK": {"NAME": "resnet", "RESNETS": {"DEPTH": 18, "WIDTH_MULTIPLIER": 1}}}
    (tmp_path / "run.json").write_text(json.dumps(trunk))
    key = r"config\.MODEL\.TRUNK\."
    with pytest.raises(UserError, match=rf"{other}its run had {key}NAME=resnet {key}RESNETS\.DEPTH=18; add this to"):
        load(config, large, checkpoint(small), **how)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"of another shape a\.weight \(3x2 in the file, 3x3 here\)"):
        load(config, Model(a=torch.nn.Linear(3, 3)), checkpoint(small), **how)
    compiled = {f"_orig_mod.{key}": value for key, value in checkpoint(small)["classy_state_dict"]["base_model"]
                ["model"]["trunk"].items()}  # fmt: skip
    state = checkpoint(small)
    state["classy_state_dict"]["base_model"]["model"]["trunk"] = compiled
    load(config, small, state, **how)


@pytest.mark.parametrize("heads", [True, False])
def test_heads_that_are_not_loaded_are_reported_once(heads: bool, capsys: pytest.CaptureFixture) -> None:
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 3), "heads": torch.nn.ModuleList([torch.nn.Linear(3, 4)])})
    parts = {name: dict(model[name].state_dict()) for name in ("trunk", "heads")}
    config = config_of("config.MODEL.WEIGHTS_INIT.PARAMS_FILE=weights.torch")
    config.MODEL.FEATURE_EVAL_SETTINGS.EVAL_MODE_ON = heads
    how = {"state_dict_key_name": "classy_state_dict", "skip_layers": [], "replace_prefix": None, "append_prefix": None}
    load = base_ssl_model.init_model_from_consolidated_weights
    load(config, model, {"classy_state_dict": {"base_model": {"model": dict(parts)}}}, **how)
    said = capsys.readouterr().out
    assert said == ("the heads in weights.torch (2 tensors) are not used by this evaluation\n" if heads else "")
    parts["heads"]["0.weight"] = torch.zeros(5, 3)
    if not heads:
        with pytest.raises(UserError, match=r"other heads .* to start with new heads add .*SKIP_LAYERS="):
            load(config, model, {"classy_state_dict": {"base_model": {"model": dict(parts)}}}, **how)


def test_an_evaluation_of_heads_needs_the_heads_of_the_file() -> None:
    """VISSL's own kNN evaluation takes the features of SimCLR's head, which a method of ours does not have."""
    weights = "config.MODEL.WEIGHTS_INIT.PARAMS_FILE=weights.torch"
    config = compose(["config=benchmark/nearest_neighbor/eval_resnet_8gpu_in1k_kNN", weights], [])[0].config
    small, other = torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(3, 5))
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 3), "heads": torch.nn.ModuleList([small])})
    how = {"state_dict_key_name": "classy_state_dict", "skip_layers": [], "replace_prefix": None, "append_prefix": None}
    load = base_ssl_model.init_model_from_consolidated_weights

    def checkpoint(head: torch.nn.Module) -> dict:
        heads = {f"0.{name}": value for name, value in head.state_dict().items()}
        return {"classy_state_dict": {"base_model": {"model": {"trunk": model["trunk"].state_dict(), "heads": heads}}}}

    load(config, model, checkpoint(small), **how)
    ours = torch.nn.ModuleDict({"projector": torch.nn.Linear(3, 4)})
    for head, difference in ((ours, "missing 0.weight"), (other[0], "of another shape 0.weight")):
        with pytest.raises(UserError) as refused:
            load(config, model, checkpoint(head), **how)
        said = str(refused.value)
        assert said.startswith("weights.torch has other heads than config.MODEL.HEAD: " + difference)
        assert "\n" not in said and "SKIP_LAYERS" not in said
        (advised,) = re.findall(r"config=(\S+)", said)
    features = compose([f"config={advised}"], [])[0].config.MODEL.FEATURE_EVAL_SETTINGS
    assert features.EVAL_MODE_ON and not features.EVAL_TRUNK_AND_HEAD
    config.MODEL.FEATURE_EVAL_SETTINGS = features
    load(config, model, checkpoint(ours), **how)
