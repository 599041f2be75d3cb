"""Image files that are broken are named, in one sentence, from whatever process reads them."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.tools.command import UserError
from plugins.tools.images import open_image
from solo_ext.datasets import image_dataset

pytestmark = pytest.mark.solo


def _file(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def test_images_come_out_in_rgb(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert image.mode == "RGB" and (np.asarray(image)[..., 1] == np.arange(64).reshape(8, 8)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.6])
def test_cut_files_are_named(kind, part, tmp_path):
    whole = _file(kind)
    path = tmp_path / "image"
    path.write_bytes(whole)
    open_image(path)
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError) as refused:
        open_image(path)
    assert str(refused.value).startswith(f"{path} cannot be read as an image: ") and "\n" not in str(refused.value)


def test_spoilt_files_raise_nothing_else(tmp_path):
    """Pillow raises OSError, SyntaxError, ValueError and more of files with wrong bytes."""
    generator = np.random.default_rng(1)
    refused = 0
    for kind in ("PNG", "JPEG", "TIFF"):
        whole = np.frombuffer(_file(kind), dtype=np.uint8)
        for _ in range(60):
            spoilt = whole.copy()
            spoilt[generator.integers(0, 150, 8)] = generator.integers(0, 256, 8)
            try:
                open_image(io.BytesIO(spoilt.tobytes()), "x")
            except UserError:
                refused += 1
    assert refused > 60


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("layout", ["class folders", "flat folder", "h5"])
def test_sentence_reaches_the_reader(layout, workers, tmp_path):
    (tmp_path / "a").mkdir()
    broken = tmp_path / "a" / "broken.png"
    broken.write_bytes(_file("PNG")[:70])
    path, name = {"class folders": (tmp_path, broken), "flat folder": (tmp_path / "a", broken)}.get(
        layout, (None, None)
    )
    if path is None:
        import h5py

        path, name = tmp_path / "images.h5", f"a/broken.png in {tmp_path / 'images.h5'}"
        with h5py.File(path, "w") as file:
            file["a/broken.png"] = np.frombuffer(broken.read_bytes(), dtype=np.uint8)
    options = {"no_labels": layout == "flat folder", "data_format": "h5" if layout == "h5" else "image_folder"}
    dataset = image_dataset("custom", str(path), "train", np.asarray, indexed=True, **options)
    with pytest.raises(UserError) as refused:
        next(iter(torch.utils.data.DataLoader(dataset, num_workers=workers)))
    assert str(refused.value).startswith(f"{name} cannot be read as an image: ") and "\n" not in str(refused.value)


@pytest.mark.slow
def test_training_stops_with_the_sentence(compose, digits, tmp_path):
    from solo_ext.main_pretrain import pretrain

    shutil.copytree(digits / "train", tmp_path / "train")
    broken = sorted(tmp_path.glob("train/5/*.png"))[0]
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=f"{broken} cannot be read as an image"):
        pretrain(compose("ssl_ey", f"data.train_path={tmp_path / 'train'}", "data.num_workers=1"))
