"""A run's folder: the same run goes on there, another one does not."""

import json
import re
from pathlib import Path

import pytest
import torch
from vissl.models import base_ssl_model

import vissl_ext  # noqa: F401  (the shims)
from plugins.tools.command import UserError
from vissl_ext.compose import compose
from vissl_ext.identity import claim
from vissl_ext.launch import prepare

pytestmark = pytest.mark.vissl


def config_of(*overrides: str):
    return compose(["config=pretrain/isoloss/digits", *overrides], [])[0].config


def test_the_same_run_may_go_on_with_more_epochs_and_other_data(tmp_path: Path) -> None:
    claim(tmp_path, "train", config_of())
    (tmp_path / "model_phase1.torch").touch()
    claim(tmp_path, "train", config_of("config.OPTIMIZER.num_epochs=99", "config.DATA.TRAIN.DATA_PATHS=[elsewhere]"))


@pytest.mark.parametrize(
    ("overrides", "engine", "sentence"),
    [
        (["config.LOSS.isoloss.rho=0.5"], "train", "config.LOSS.isoloss.rho=0.99, this one has 0.5"),
        (["config.SEED_VALUE=9"], "train", "config.SEED_VALUE=5, this one has 9"),
        (["config.MODEL.TRUNK.RESNETS.DEPTH=34"], "train", "config.MODEL.TRUNK.RESNETS.DEPTH=18, this one has 34"),
        ([], "knn", "engine_name=train, this one has knn"),
    ],
)
def test_another_run_is_refused_where_there_are_checkpoints(tmp_path, overrides, engine, sentence) -> None:
    claim(tmp_path, "train", config_of())
    before = (tmp_path / "run.json").read_text()
    (tmp_path / "model_final_checkpoint_phase1.torch").touch()
    with pytest.raises(UserError, match=re.escape(sentence)):
        claim(tmp_path, engine, config_of(*overrides))
    assert (tmp_path / "run.json").read_text() == before
    (tmp_path / "model_final_checkpoint_phase1.torch").unlink()
    claim(tmp_path, engine, config_of(*overrides))
    assert (tmp_path / "run.json").read_text() != before


def test_another_method_does_not_touch_a_finished_run(few_digits: Path, tmp_path: Path) -> None:
    data = f"config.DATA.TRAIN.DATA_PATHS=[{few_digits}/train]"
    words = [data, f"config.CHECKPOINT.DIR={tmp_path}"]
    prepare(["config=pretrain/isoloss/digits", *words], [])
    written = (tmp_path / "train_config.yaml").read_text()
    torch.save({}, tmp_path / "model_final_checkpoint_phase19.torch")
    with pytest.raises(UserError, match=r"holds a run with config\.LOSS\.name=isoloss, this one has byol"):
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


def test_a_checkpoint_of_another_trunk_is_refused(tmp_path: Path) -> None:
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
        load.__wrapped__(config, model, checkpoint(state), **how)  # not a word, or mended upstream
    other = r"weights\.torch is a checkpoint of another trunk .*: "
    with pytest.raises(UserError, match=other + r"missing b\.weight and 1 more\. It is probably"):
        load(config, large, checkpoint(small), **how)
    with pytest.raises(UserError, match=other + r"left over b\.weight and 1 more\. It is probably"):
        load(config, small, checkpoint(large), **how)
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
        with pytest.raises(UserError, match=r"other heads .* to begin with new heads add .*SKIP_LAYERS="):
            load(config, model, {"classy_state_dict": {"base_model": {"model": dict(parts)}}}, **how)
