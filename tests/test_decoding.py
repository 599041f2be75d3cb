"""Every reader of image files gives the same pixels, those that the file's values mean, for every mode of Pillow."""

import io
import struct
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from plugins.tools.command import UserError
from plugins.tools.images import open_image

pytestmark = [pytest.mark.solo, pytest.mark.vissl, pytest.mark.lightly]
HEIGHT, WIDTH = 16, 24

RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
BYTES = np.round(RAMP * 255).astype(np.uint8)
WORDS = np.round(RAMP * 65535).astype(np.uint16)
NOISE = np.random.default_rng(0).integers(256, size=BYTES.shape, dtype=np.uint8)  # DALI reads no WebP of 60 bytes
COLOURS = np.stack([BYTES, 255 - BYTES, NOISE], -1)
BITS = BYTES >= 128
FEW = (COLOURS // 64) * 64  # few enough colours for a palette


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def _from_luminance(pixels: np.ndarray) -> np.ndarray:
    """BT.601 of all 256 levels, as JFIF has it: bytes of Y, Cb, Cr → R, G, B."""
    y, cb, cr = np.moveaxis(pixels.astype(float), -1, 0) - np.array([0, 128, 128])[:, None, None]
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)


def _from_lab(pixels: np.ndarray) -> np.ndarray:
    """Bytes of CIE Lab under D50 → sRGB, by the definitions of CIE 1976 and IEC 61966-2-1."""
    a_and_b = pixels[..., 1:].view(np.int8).astype(float)  # two's complement, as TIFF stores them
    lightness, (a, b) = pixels[..., 0] / 2.55, np.moveaxis(a_and_b, -1, 0)
    f = np.stack([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    from_d50 = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(from_d50).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _deep_png() -> bytes:
    """A PNG file of 16-bit RGB, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOURS)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name of a file → its bytes, and the pixels that it means."""
    colour, grey = Image.fromarray(COLOURS), Image.fromarray(BYTES)
    alpha = Image.fromarray(np.concatenate([COLOURS, BYTES[..., None]], -1))
    palette = Image.fromarray(FEW).convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(WORDS)
    turned = Image.Exif()
    turned[274] = 6  # the camera was turned: the file's left column is the picture's top row
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(colour, *profiles, outputMode="LAB")
    luminance = colour.convert("YCbCr")
    cmyk = np.asarray(colour.convert("CMYK")).astype(int)
    upright = np.rot90(COLOURS, -1)
    jpeg = np.asarray(Image.open(io.BytesIO(_saved(colour, "JPEG", quality=95))))
    return {
        "grey.png": (_saved(grey, "PNG"), _grey(BYTES)),
        "colour.png": (_saved(colour, "PNG"), COLOURS),
        "colour.tif": (_saved(colour, "TIFF"), COLOURS),
        "colour.bmp": (_saved(colour, "BMP"), COLOURS),
        "colour.webp": (_saved(colour, "WEBP", lossless=True), COLOURS),
        "colour.jpg": (_saved(colour, "JPEG", quality=95), jpeg),
        "bits.png": (_saved(Image.fromarray(BITS), "PNG"), _grey(255 * BITS.astype(np.uint8))),
        "bits.tif": (_saved(Image.fromarray(BITS), "TIFF"), _grey(255 * BITS.astype(np.uint8))),
        "deep.png": (_saved(deep, "PNG"), _grey(RAMP * 255)),
        "deep.tif": (_saved(deep, "TIFF"), _grey(RAMP * 255)),
        "deep_big_endian.tif": (_saved(Image.fromarray(WORDS.astype(">u2")), "TIFF"), _grey(RAMP * 255)),
        "deep.pgm": (b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + WORDS.astype(">u2").tobytes(), _grey(RAMP * 255)),
        "deep_colour.png": (_deep_png(), COLOURS),
        "integers.tif": (_saved(Image.fromarray(WORDS.astype(np.int32)), "TIFF"), _grey(RAMP * 255)),
        "floats.tif": (_saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), _grey(RAMP * 255)),
        "palette.png": (_saved(palette, "PNG"), FEW),
        "palette_one_transparent.png": (_saved(palette, "PNG", transparency=3), FEW),
        "palette_transparent.png": (_saved(palette, "PNG", transparency=bytes(range(16))), FEW),
        "alpha.png": (_saved(alpha, "PNG"), COLOURS),
        "alpha.webp": (_saved(alpha, "WEBP", lossless=True, exact=True), COLOURS),
        "grey_alpha.png": (_saved(Image.merge("LA", (grey, grey)), "PNG"), _grey(BYTES)),
        "cmyk.tif": (_saved(colour.convert("CMYK"), "TIFF"), 255 - np.minimum(cmyk[..., :3] + cmyk[..., 3:], 255)),
        "luminance.tif": (_saved(luminance, "TIFF"), _from_luminance(np.asarray(luminance))),
        "lab.tif": (_saved(lab, "TIFF"), _from_lab(np.asarray(lab))),
        "turned.jpg": (_saved(colour, "JPEG", quality=95, exif=turned), np.rot90(jpeg, -1)),
        "turned.png": (_saved(colour, "PNG", exif=turned), upright),
        "turned.tif": (_saved(colour, "TIFF", exif=turned), upright),
        "turned.webp": (_saved(colour, "WEBP", lossless=True, exif=turned), upright),
    }


FILES = _files()
NOT_DALI = {"bits.tif", "integers.tif", "floats.tif", "cmyk.tif", "luminance.tif", "lab.tif", "turned.webp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one class with all files."""
    place = tmp_path_factory.mktemp("modes")
    (place / "class").mkdir()
    for name, (content, _) in FILES.items():
        (place / "class" / name).write_bytes(content)
    return place


def _solo(folder: Path) -> list[np.ndarray]:
    from solo_ext.datasets import image_dataset

    options = {"indexed": False, "no_labels": False}
    return [image for image, _ in image_dataset("custom", str(folder), "train", np.asarray, **options)]


def _solo_flat(folder: Path) -> list[np.ndarray]:
    from solo_ext.datasets import image_dataset

    options = {"indexed": False, "no_labels": True}
    return [image for image, _ in image_dataset("custom", str(folder / "class"), "train", np.asarray, **options)]


def _solo_h5(folder: Path) -> list[np.ndarray]:
    import h5py

    from solo_ext.datasets import image_dataset

    path = folder / "images.h5"
    with h5py.File(path, "w") as file:
        for name, (content, _) in FILES.items():
            file[f"class/{name}"] = np.frombuffer(content, dtype=np.uint8)
    options = {"indexed": False, "no_labels": False, "data_format": "h5"}
    return [image for image, _ in image_dataset("custom", str(path), "train", np.asarray, **options)]


def _vissl(folder: Path, source: str) -> list[np.ndarray]:
    import_module("vissl_ext")  # first: it lets VISSL be imported
    from vissl.config import AttrDict
    from vissl.data.disk_dataset import DiskImageDataset

    keys = ("REMOVE_IMG_PATH_PREFIX", "NEW_IMG_PATH_PREFIX")
    data = {**dict.fromkeys(keys, ""), "ENABLE_QUEUE_DATASET": False, "BATCHSIZE_PER_REPLICA": 2, "MMAP_MODE": False}
    path = folder
    if source == "disk_filelist":
        path = folder / "images.npy"
        np.save(path, np.array([str(folder / "class" / name) for name in sorted(FILES)]))
    images = DiskImageDataset(AttrDict({"DATA": {"TRAIN": data}}), source, str(path), "TRAIN", "it")
    read = [images[index] for index in range(len(FILES))]
    assert all(found for _, found in read)
    return [np.asarray(image) for image, _ in read]


def _vissl_folder(folder: Path) -> list[np.ndarray]:
    return _vissl(folder, "disk_folder")


def _vissl_list(folder: Path) -> list[np.ndarray]:
    return _vissl(folder, "disk_filelist")


def _lightly(folder: Path) -> list[np.ndarray]:
    from lightly_ext.benchmarks.setup import image_folder

    return [image for image, *_ in image_folder(folder, np.asarray)]


@pytest.mark.parametrize("read", [_solo, _solo_flat, _solo_h5, _vissl_folder, _vissl_list, _lightly])
def test_every_framework_reads_the_pixels_that_the_file_means(read: Callable, folder: Path) -> None:
    pixels = dict(zip(sorted(FILES), read(folder), strict=True))
    for name, (_, wanted) in FILES.items():
        assert pixels[name].dtype == np.uint8 and pixels[name].shape == wanted.shape, name
        # one level for a rounding; none where the file holds the bytes
        error = np.abs(pixels[name] - wanted.astype(float)).max()
        assert error <= 1, (name, error)


def test_dali_reads_the_same_pixels_or_names_the_file(folder: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    from plugins.tools.images import check_dali_reads

    names = [name for name in sorted(FILES) if name not in NOT_DALI]

    @pipeline_def(batch_size=len(names), num_threads=1, device_id=None)
    def pipeline() -> tuple:
        encoded, _ = fn.readers.file(files=[str(folder / "class" / name) for name in names])
        return (fn.decoders.image(encoded, device="cpu", output_type=types.RGB),)

    (images,) = pipeline().run()
    for name, image in zip(names, images, strict=True):
        check_dali_reads(str(folder / "class" / name))
        ours = np.asarray(open_image(folder / "class" / name)).astype(int)
        assert np.abs(ours - np.asarray(image)).max() <= 1, name
    for name in NOT_DALI:
        path = folder / "class" / name
        with pytest.raises(
            UserError, match=rf"DALI cannot read {path}, a (TIFF|WebP) file .+; use data.format=image_folder"
        ):
            check_dali_reads(str(path))


@pytest.mark.parametrize(
    ("values", "range_"),
    [
        (np.full((4, 4), 255.0, np.float32), "from 255 to 255, allowed are 0 to 1"),
        (np.array([[0.0, -0.5]], np.float32), "from -0.5 to 0, allowed are 0 to 1"),
        (np.array([[0.0, np.nan]], np.float32), "from nan to nan, allowed are 0 to 1"),
        (np.array([[7, 65536]], np.int32), "from 7 to 65536, allowed are 0 to 65535"),
    ],
)
def test_values_out_of_range_are_an_error_that_names_the_file(values: np.ndarray, range_: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    Image.fromarray(values).save(path)
    wanted = f"{path} cannot be read as an image: its values range {range_}; rescale the image"
    with pytest.raises(UserError) as refused:
        open_image(path)
    assert str(refused.value) == wanted
