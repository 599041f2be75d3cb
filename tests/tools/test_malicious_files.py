"""Files from outside that try to run code, write elsewhere, or fill the memory."""

import io
import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from plugins.experiments.results import _read_result
from plugins.tools import data
from plugins.tools.command import UserError
from plugins.tools.export import read_backbone
from plugins.tools.features import load_arrays
from plugins.tools.images import open_image
from plugins.tools.probe_file import read_probes
from plugins.tools.weights import load_dissl


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def refused(function, *arguments, marker):
    """Return the one-line error, and check that no code has run."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert not marker.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("read", [read_backbone, load_dissl])
@pytest.mark.parametrize("how", ["new", "old", "pickle"])
def test_checkpoints(how, read, tmp_path):
    path, marker = tmp_path / "a.pth", tmp_path / "ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Touch(marker)))
    else:
        torch.save({"state_dict": Touch(marker)}, path, _use_new_zipfile_serialization=how == "new")
    assert refused(read, path, marker=marker).startswith(str(path))


def test_arrays(tmp_path):
    path, labels, marker = tmp_path / "a.npy", tmp_path / "labels.npy", tmp_path / "ran"
    np.save(path, np.array([[Touch(marker)]], dtype=object), allow_pickle=True)
    np.save(labels, np.zeros(1, dtype=int))
    assert refused(load_arrays, path, labels, marker=marker).startswith(f"{path} is not a readable .npy file")
    path.write_bytes(pickle.dumps(Touch(marker)))
    assert refused(load_arrays, path, labels, marker=marker).startswith(f"{path} is not a readable .npy file")
    np.savez(tmp_path / "b.npz", a=np.array([Touch(marker)], dtype=object))
    assert "no array" in refused(load_arrays, tmp_path / "b.npz", labels, marker=marker)


def test_an_array_that_claims_more_than_the_memory(tmp_path):
    path, labels = tmp_path / "a.npy", tmp_path / "labels.npy"
    np.save(labels, np.zeros(1, dtype=int))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**50, 8)})
    assert refused(load_arrays, path, labels, marker=tmp_path / "ran").startswith(f"{path} is not a readable .npy file")


def test_yaml(tmp_path):
    path, marker = tmp_path / "probe.yaml", tmp_path / "ran"
    path.write_text(f"probes: !!python/object/apply:os.system ['touch {marker}']\n")
    assert refused(read_probes, path, marker=marker).startswith(f"{path} is not a valid YAML file")


def archive(path, files):
    """A zip archive of these names and contents, and of what Tiny ImageNet must have beside them."""
    usual = {"wnids.txt": "n1\n", "train/n1/n1_boxes.txt": "a.JPEG 0 0 1 1\n", "train/n1/images/a.JPEG": "x"}
    usual |= {"val/val_annotations.txt": "b.JPEG n1 0 0 1 1\n", "val/images/b.JPEG": "y"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**usual, **files}.items():
            file.writestr(f"tiny-imagenet-200/{name}" if isinstance(name, str) else name, content)
    return path


def link(name):
    """An entry that is marked as a symbolic link, as ``zip --symlinks`` writes it."""
    info = zipfile.ZipInfo(f"tiny-imagenet-200/{name}")
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "files",
    [
        {"wnids.txt": "n1\n../../../evil\n", "train/../../../evil/../../../evil_boxes.txt": ""},
        {"wnids.txt": "n1\n{out}/evil\n", "train/{out}/evil/{out}/evil_boxes.txt": ""},
        {"wnids.txt": "n1\n..\n", "train/../.._boxes.txt": ""},
        {"train/n1/n1_boxes.txt": "../../../evil 0\n", "train/n1/images/../../../evil": "x"},
        {"train/n1/n1_boxes.txt": "{out}/evil 0\n", "train/n1/images/{out}/evil": "x"},
        {"val/val_annotations.txt": "../../evil n1\n", "val/images/../../evil": "x"},
        {"val/val_annotations.txt": "b.JPEG\n"},
        {"wnids.txt": b"\xff\xfe\n"},
        {"val/images/b.JPEG": b"\0" * (data.LARGEST_FILE + 1)},
    ],
    ids=["class up", "class absolute", "class dots", "up", "absolute", "val up", "short line", "no text", "bomb"],
)
def test_archives_write_nowhere_else(files, tmp_path):
    named = {name.replace("{out}", str(tmp_path)): content for name, content in files.items()}
    for name, content in named.items():
        if isinstance(content, str):
            named[name] = content.replace("{out}", str(tmp_path))
    path = archive(tmp_path / "tiny.zip", named)
    refused(data.make_tinyimagenet, path, tmp_path / "a" / "out", marker=tmp_path / "evil")
    assert sorted(found.name for found in tmp_path.iterdir() if found.name != "a") == ["tiny.zip"]
    assert not any((tmp_path / "a").iterdir())


def test_archives_make_no_links(tmp_path):
    path = archive(tmp_path / "tiny.zip", {})
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as target, zipfile.ZipFile(path) as source:
        for name in source.namelist():
            if name.endswith("b.JPEG"):
                target.writestr(link("val/images/b.JPEG"), "/etc/passwd")
            else:
                target.writestr(name, source.read(name))
    assert data.make_tinyimagenet(tmp_path / "link.zip", tmp_path / "out")
    image = tmp_path / "out" / "val" / "n1" / "b.JPEG"
    assert not image.is_symlink() and image.read_text() == "/etc/passwd"  # the link's text, not the file


def test_encrypted_archives_are_named(tmp_path):
    path = archive(tmp_path / "tiny.zip", {})
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of encryption, in both directories
        place = content.find(mark)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(mark, place + 4)
    path.write_bytes(content)
    assert "is corrupt" in refused(data.make_tinyimagenet, path, tmp_path / "out", marker=tmp_path / "ran")


def test_images_that_claim_to_be_huge(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "BMP")
    content = bytearray(buffer.getvalue())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    (tmp_path / "a.bmp").write_bytes(content)
    assert "could be decompression bomb" in refused(open_image, tmp_path / "a.bmp", marker=tmp_path / "ran")


@pytest.mark.solo
def test_json_that_nests_without_end(tmp_path):
    from solo_ext.features import read_run

    (tmp_path / "args.json").write_text("[" * 200_000)
    assert "args.json is not valid JSON" in refused(read_run, tmp_path, marker=tmp_path / "ran")
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    refused(data.make_digits, tmp_path, marker=tmp_path / "ran")


def test_results_that_nest_without_end_are_no_results(tmp_path):
    (tmp_path / "result.json").write_text("[" * 200_000)
    assert _read_result(tmp_path / "result.json") is None


@pytest.mark.solo
@pytest.mark.parametrize("kind", ["soft", "external", "storage", "broken", "group"])
def test_hdf5(kind, tmp_path):
    from solo_ext.datasets import H5Images

    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"12345678")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["class/image"] = np.zeros(8, dtype=np.uint8)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("class")
        if kind == "soft":
            group["image"] = h5py.SoftLink("/class")
        elif kind == "external":
            group["image"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/class/image")
        elif kind == "storage":
            group.create_dataset("image", (8,), np.uint8, external=[(str(secret), 0, 8)])
        elif kind == "broken":
            file["gone"] = h5py.SoftLink("/nowhere")
        else:
            group.create_group("image")

    def read():
        H5Images(str(path), lambda image: image)[0]

    error = refused(read, marker=tmp_path / "ran")
    assert str(path) in error
    assert kind in ("broken", "group") or "another file" in error
