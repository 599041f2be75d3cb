"""VISSL's readers of lists, labels and permutations run no code of a malicious file."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vissl.config import AttrDict
from vissl.data import disk_dataset, ssl_dataset
from vissl.data.ssl_transforms import shuffle_img_patches
from vissl.utils import io

import vissl_ext  # noqa: F401
from plugins.tools.command import UserError
from vissl_ext.catalog import class_count

pytestmark = pytest.mark.vissl


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def write(path: Path, marker: Path) -> None:
    """A malicious file of the kind that its name shows."""
    if path.suffix == ".npy":
        np.save(path, np.array([Touch(marker)], dtype=object), allow_pickle=True)
    elif path.suffix == ".yaml":
        path.write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")
    else:
        path.write_bytes(pickle.dumps(Touch(marker)))


@pytest.mark.parametrize("module", [io, disk_dataset, shuffle_img_patches], ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", [".npy", ".pkl", ".pickle", ".yaml"])
def test_files_run_no_code(kind: str, module: Any, tmp_path: Path) -> None:
    path, marker = tmp_path / f"evil{kind}", tmp_path / "ran"
    write(path, marker)
    with pytest.raises(UserError, match=f"^{path} cannot be read") as error:
        module.load_file(str(path))
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize("mapped", [True, False])
def test_labels_run_no_code(mapped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "labels.npy", tmp_path / "ran"
    write(path, marker)
    dataset = SimpleNamespace(cfg=AttrDict({"DATA": {"TRAIN": {"MMAP_MODE": mapped}}}), split="TRAIN")
    read = ssl_dataset.GenericSSLDataset.load_single_label_file
    with pytest.raises(UserError, match=f"^{path} cannot be read"):
        read(dataset, str(path))
    assert not marker.exists()
    np.load(path, allow_pickle=True)  # as VISSL has it
    assert marker.exists(), "this attack is none"
    np.save(path, np.arange(3))
    assert read(dataset, str(path)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_plain_values_come_out(protocol: int, tmp_path: Path) -> None:
    saved = {"gnd": [{"ok": np.arange(3)}], "n": np.float64(0.5), "names": ("a", {"b"}), "raw": b"\x00\xff"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(saved, protocol=protocol))
    read = io.load_file(str(tmp_path / "a.pkl"))
    assert read["gnd"][0]["ok"].tolist() == [0, 1, 2]
    assert {key: read[key] for key in ("n", "names", "raw")} == {key: saved[key] for key in ("n", "names", "raw")}


def test_maps_and_other_kinds(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4))
    assert isinstance(io.load_file(str(tmp_path / "a.npy"), mmap_mode="r"), np.memmap)
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert io.load_file(str(tmp_path / "a.json")) == {"a": [1]}
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="its name must end in"):
        io.load_file(str(tmp_path / "a.txt"))


def test_labels_are_counted_without_running_them(tmp_path: Path) -> None:
    path, marker = tmp_path / "labels.npy", tmp_path / "ran"
    data = SimpleNamespace(LABEL_PATHS=[str(path)], LABEL_SOURCES=["disk_filelist"], DATA_PATHS=[], DATA_SOURCES=[])
    np.save(path, np.array([0, 4, 2]))
    assert class_count(data) == 5
    write(path, marker)
    with pytest.raises(UserError, match=f"^{path} cannot be read"):
        class_count(data)
    assert not marker.exists()
