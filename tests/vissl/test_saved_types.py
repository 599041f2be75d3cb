"""Files of former VISSL load on today's torch; files that name code do not."""

import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vissl.config import AttrDict
from vissl.utils.cluster_utils import ClusterAssignment, ClusterAssignmentLoader
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from vissl_ext import compat
from vissl_ext.compat.saved_types import unknown_types
from vissl_ext.registry import register
from vissl_ext.task import PluginTask

register()
pytestmark = pytest.mark.vissl

_FORMER = {
    b"numpy._core.multiarray": b"numpy.core.multiarray",
    b"vissl.config.attr_dict": b"vissl.utils.hydra_config",
}
"""Module names in current releases → those in the releases of VISSL's time."""


def save_as_formerly(content: Any, path: Path, zipped: bool) -> None:
    """torch.save, with the names of 2021, in torch's format since 1.6 or before."""
    new = path.with_suffix(".new")
    torch.save(content, new, _use_new_zipfile_serialization=zipped)

    def aged(data: bytes) -> bytes:
        for present, former in _FORMER.items():
            data = data.replace(present, former)
        assert b"cnumpy.core.multiarray\nscalar" in data and b"cvissl.utils.hydra_config\nAttrDict" in data
        return data

    if not zipped:
        path.write_bytes(aged(new.read_bytes()))
        return
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, aged(data) if name.endswith("data.pkl") else data)


def former_checkpoint(model: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of VISSL 0.1.5, whose parts hold NumPy's numbers and whose configuration is beside them."""
    state = {
        "train": True,
        "base_model": {"model": model, "meta": {}},
        "meters": [],
        "losses": [np.float64(7.5), 7.25],
        "optimizer": {"optim": {"param_groups": [{"lr": np.float32(0.25), "params": [0]}], "state": {}}},
        "num_updates": np.int64(3),
    }
    return {
        **{"phase_idx": 2, "iteration": 3, "iteration_num": 0, "train_phase_idx": 2, "loss": {}},
        "best": np.array([1.5, 2.5]),
        "config": AttrDict({"DATA": {"TRAIN": {"DATA_LIMIT": -1}}}),
        "args": Namespace(arch="resnet50"),
        "classy_state_dict": state,
    }


def same(saved: Any, loaded: Any) -> bool:
    """Equal values; an AttrDict has become a plain mapping."""
    if isinstance(saved, dict):
        return saved.keys() == loaded.keys() and all(same(value, loaded[key]) for key, value in saved.items())
    if isinstance(saved, list):
        return len(saved) == len(loaded) and all(map(same, saved, loaded))
    if isinstance(saved, torch.Tensor | np.ndarray | np.generic):
        return type(saved) is type(loaded) and saved.dtype == loaded.dtype and bool((saved == loaded).all())
    return saved == loaded


@pytest.fixture
def no_types_of_ours():
    """Remove the types that our patch allows, until the test ends."""
    ours = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(ours)


@pytest.mark.parametrize(
    "value",
    [np.float64(7.5), np.array([1.5]), AttrDict({"DATA": 1}), Namespace(arch="resnet50")],
    ids=lambda value: type(value).__name__,
)
def test_each_is_needed(value: Any, tmp_path: Path, no_types_of_ours: None) -> None:
    path = tmp_path / "value.torch"
    torch.save({"value": value}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path)
    assert unknown_types(str(path)) != []
    compat.activate()
    assert same({"value": value}, torch.load(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_saved_types_are_needed(zipped: bool, tmp_path: Path, no_types_of_ours: None) -> None:
    path = tmp_path / "former.torch"
    saved = former_checkpoint({"trunk": {"w": torch.arange(3.0)}})
    save_as_formerly(saved, path, zipped)
    with pytest.raises(Exception, match=r"Weights only load failed[\s\S]*numpy.core.multiarray"):
        torch.load(path)
    compat.activate()
    assert same(saved, torch.load(path))
    assert unknown_types(str(path)) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_former_checkpoint_initialises_a_model(zipped: bool, tmp_path: Path) -> None:
    words = ["config=pretrain/isoloss/digits", "config.LOSS.isoloss.proj_hidden_dim=12"]
    config = convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1]
    task = PluginTask.from_config(config)
    torch.manual_seed(0)
    former = task._build_model()
    former.trunk._feature_blocks["bn1"].running_mean.fill_(0.5)
    model = {"trunk": former.trunk.state_dict(), "heads": former.heads.state_dict()}
    save_as_formerly(former_checkpoint(model), tmp_path / "former.torch", zipped)
    config.MODEL.WEIGHTS_INIT.PARAMS_FILE = str(tmp_path / "former.torch")
    torch.manual_seed(1)
    present = task._build_model()
    assert same(dict(former.state_dict()), dict(present.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_rejected(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "code.torch"
    torch.save({"schedule": partial(print, "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception, match=r"Weights only load failed[\s\S]*functools.partial"):
        torch.load(path)
    assert unknown_types(str(path)) == (["builtins.print", "functools.partial"] if zipped else [])


def test_clusters_are_read_as_they_were_written(tmp_path: Path) -> None:
    """The configuration is an AttrDict, including nested sections."""
    config = AttrDict({"DATA": {"TRAIN": {"TRANSFORMS": [], "DATA_LIMIT": 7}}})
    written = ClusterAssignment(config=config, cluster_assignments={"TRAIN": {0: 3, 1: 5}})
    ClusterAssignmentLoader.save_cluster_assignment(str(tmp_path), written)
    read = ClusterAssignmentLoader.load_cluster_assigment(str(tmp_path / "cluster_assignments.torch"))
    assert read == written and isinstance(read.config, AttrDict)
    assert read.config.DATA.TRAIN.DATA_LIMIT == 7


def test_clusters_need_it(tmp_path: Path, no_types_of_ours: None) -> None:
    written = SimpleNamespace(config=AttrDict({}), cluster_assignments={})
    ClusterAssignmentLoader.save_cluster_assignment(str(tmp_path), written)
    with pytest.raises(Exception, match=r"Weights only load failed[\s\S]*vissl.config.attr_dict.AttrDict"):
        ClusterAssignmentLoader.load_cluster_assigment.__wrapped__(str(tmp_path / "cluster_assignments.torch"))
