"""Create image folders for training: ``python -m plugins.tools.data digits``, ``tinyimagenet`` or ``subset``.

``digits`` writes the 1797 real handwritten digits of scikit-learn (8x8 pixels, test part of the UCI data set "Optical
Recognition of Handwritten Digits"). The original images are too easy: the features of an untrained ResNet-18 already
separate the classes. Each digit is therefore rendered once on a larger canvas, with a fixed random shift, scale,
rotation and colour, on a dark background of another random colour, with sensor noise. The usual augmentations (random
crop, colour jitter, grey scale, blur) make a network invariant to these nuisances.

The layout can be read by torchvision's ImageFolder::

    datasets/digits/train/<0-9>/<row>.png      1297 images
    datasets/digits/val/<0-9>/<row>.png         500 images, 50 of each class
    datasets/digits/train_5/<0-9>/<row>.png      50 images of train, 5 of each class
    datasets/digits/manifest.json              settings, counts, mean and standard deviation of train

``<row>`` is the row of the digit in ``sklearn.datasets.load_digits()``.

``tinyimagenet`` sorts the images of Stanford's archive tiny-imagenet-200.zip (200 classes, 64x64 pixels) into class
folders. Download the archive first. Its validation images are in a single folder with a list of their classes. The
files are copied unchanged::

    datasets/tinyimagenet/train/<class>/*.JPEG  500 images of each class
    datasets/tinyimagenet/val/<class>/*.JPEG     50 images of each class
    datasets/tinyimagenet/manifest.json         counts

``subset`` selects a fraction of the images of any data set with class folders, for semi-supervised fine-tuning: the
same number of random images per class, or the images in a published list. The files are hard links, or copies if the
file system has no hard links::

    datasets/imagenet/train_1/<class>/*.JPEG
    datasets/imagenet/train_1/manifest.json     settings, counts
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugins.tools.command import UserError, with_command_name
from plugins.tools.records import read_json

if TYPE_CHECKING:
    import numpy as np

CLASSES = 10
VAL_PER_CLASS = 50
FEW_PER_CLASS = 5
SCALE = (0.85, 1.0)
"""Range of the side of the digit's 8x8 box, as a fraction of the canvas."""
SHIFT = 0.03
"""Largest shift of the digit's centre along each axis, as a fraction of the canvas."""
ROTATION = 6.0
"""Largest rotation, in degrees."""
TINT = 0.45
"""Largest darkening of each colour channel of the digit. The channels of the background are at most 60 % of it."""
FADE = 0.3
"""Largest reduction of the digit's brightness, the same for all channels."""
NOISE = 0.02
"""Standard deviation of the noise of each pixel."""
OVERSAMPLING = 2
"""Number of samples per pixel along each axis; the pixel is their mean."""


def place_digit(digit: "np.ndarray", *, size: int, scale: float, shift: tuple[float, float], angle: float) -> Any:
    """Rotate a digit about its centre, scale it and shift it on a black square canvas, with bilinear interpolation.

    Args:
        digit: intensities ``[8, 8]`` in [0, 1].
        size: side of the canvas in pixels.
        scale: side of the digit's box divided by the side of the canvas.
        shift: shift of the centre to the right and downwards, as fractions of the side of the canvas.
        angle: clockwise rotation in radians.

    Returns:
        Intensities ``[size, size]`` in [0, 1].
    """
    import numpy as np

    fine = size * OVERSAMPLING
    position = (np.arange(fine) + 0.5) / fine - 0.5
    y, x = np.meshgrid(position - shift[1], position - shift[0], indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    side = digit.shape[0]
    # Map the canvas to pixel indices of the digit, padded by two black pixels, so that everything outside is black.
    column = np.clip((cos * x + sin * y) * side / scale + side / 2 + 1.5, 0, side + 2.5)
    row = np.clip((cos * y - sin * x) * side / scale + side / 2 + 1.5, 0, side + 2.5)
    padded = np.pad(digit, 2)
    left, top = column.astype(int), row.astype(int)
    right, down = column - left, row - top
    ink = (padded[top, left] * (1 - right) + padded[top, left + 1] * right) * (1 - down)
    ink += (padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right) * down
    return ink.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))


def render_digit(digit: "np.ndarray", *, size: int, rng: "np.random.Generator") -> Any:
    """Render a digit with random position, colours and noise.

    Args:
        digit: intensities ``[8, 8]`` in [0, 1].
        size: side of the canvas in pixels.
        rng: random generator.

    Returns:
        An RGB image ``[size, size, 3]``, uint8.
    """
    import numpy as np

    ink = place_digit(
        digit,
        size=size,
        scale=rng.uniform(*SCALE),
        shift=(rng.uniform(-SHIFT, SHIFT), rng.uniform(-SHIFT, SHIFT)),
        angle=np.deg2rad(rng.uniform(-ROTATION, ROTATION)),
    )[..., None]
    front = rng.uniform(1 - TINT, 1, 3) * (1 - rng.uniform(0, FADE))
    back = rng.uniform(0, 0.6 * TINT, 3)
    noise = NOISE * rng.standard_normal((size, size, 1))
    return np.round(255 * np.clip(back * (1 - ink) + front * ink + noise, 0, 1)).astype(np.uint8)


def split_rows(labels: "np.ndarray", *, seed: int) -> dict[str, list[int]]:
    """Split the rows at random: 50 per class for validation, the others for training, and 5 per class of the latter.

    Args:
        labels: class of each row.
        seed: seed of the split.

    Returns:
        Rows of ``train``, ``val`` and ``train_5``, ascending; ``train_5`` is a subset of ``train``.
    """
    import numpy as np

    splits: dict[str, list[int]] = {"train": [], "val": [], "train_5": []}
    for label in range(CLASSES):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label)).tolist()
        splits["val"] += rows[:VAL_PER_CLASS]
        splits["train"] += rows[VAL_PER_CLASS:]
        splits["train_5"] += rows[VAL_PER_CLASS : VAL_PER_CLASS + FEW_PER_CLASS]
    return {name: sorted(rows) for name, rows in splits.items()}


def make_digits(out: str | os.PathLike[str] = "datasets/digits", *, size: int = 16, seed: int = 0) -> bool:
    """Write the digits, unless the folder already contains them.

    Args:
        out: the folder to create. It is renamed into place when it is complete.
        size: side of the images in pixels, >= 8.
        seed: seed of the rendering and of the split.

    Returns:
        Whether files were written.

    Raises:
        UserError: the folder contains other files, or a setting is out of range.
    """
    if size < 8:
        raise UserError(f"size must be at least 8 pixels, got {size}")
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}")
    return _make(Path(out), _settings(size=size, seed=seed), _write_digits)


def _make(out: Path, settings: dict[str, Any], write: Callable[[Path, dict[str, Any]], None]) -> bool:
    """Fill a temporary folder with ``write(folder, settings)`` and rename it to ``out`` when it is complete.

    Returns:
        Whether files were written; False if ``out`` was created with the same settings before.
    """
    if _holds(out, settings):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        write(scratch, settings)
        try:
            scratch.rename(out)
        except OSError:
            # Another process may have created the same folder in the meantime.
            if not _holds(out, settings):
                raise
            return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _settings(*, size: int, seed: int) -> dict[str, Any]:
    """Return all settings that determine the images."""
    recipe = {
        "scale": list(SCALE),
        "shift": SHIFT,
        "rotation": ROTATION,
        "tint": TINT,
        "fade": FADE,
        "noise": NOISE,
        "oversampling": OVERSAMPLING,
    }
    return {"dataset": "digits", "seed": seed, "size": size, "recipe": recipe}


def _holds(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether the folder was created with these settings; False if it does not exist or is empty.

    Raises:
        UserError: the folder was created with other settings, or contains other files.
    """
    found = _read_manifest(out)
    if found is not None:
        differing = [name for name in settings if found.get(name) != settings[name]]
        if not differing:
            return True
        details = ", ".join(f"{name} {found.get(name)!r} instead of {settings[name]!r}" for name in differing)
        raise UserError(
            f"{out} was made with other settings ({details}); delete it or choose another folder with --out"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and was not made by this command; delete it or choose another folder with --out")
    return False


def _read_manifest(out: Path) -> dict[str, Any] | None:
    try:
        found = read_json(out / "manifest.json")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_digits(folder: Path, settings: dict[str, Any]) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images = np.stack(
        [
            render_digit(
                digit.reshape(8, 8) / 16, size=settings["size"], rng=np.random.default_rng([settings["seed"], row])
            )
            for row, digit in enumerate(pixels)
        ]
    )
    splits = split_rows(labels, seed=settings["seed"])
    for split, rows in splits.items():
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
        for row in rows:
            Image.fromarray(images[row]).save(folder / split / str(labels[row]) / f"{row:04d}.png")
    train = images[splits["train"]].reshape(-1, 3) / 255
    manifest = {
        **settings,
        "classes": CLASSES,
        "counts": {split: len(rows) for split, rows in splits.items()},
        "mean": [round(value, 4) for value in train.mean(axis=0).tolist()],
        "std": [round(value, 4) for value in train.std(axis=0).tolist()],
        "sha256_of_pixels": hashlib.sha256(images.tobytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


class _Archive:
    """The files of a zip archive or of the unpacked folder, relative to the folder that contains wnids.txt."""

    def __init__(self, place: Path) -> None:
        self.place = place
        try:
            if place.is_dir():
                self.zip, names = None, [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
            elif place.is_file():
                self.zip = zipfile.ZipFile(place)
                names = self.zip.namelist()
            else:
                raise UserError(f"there is no {place}; download tiny-imagenet-200.zip and give its path with --archive")
        except zipfile.BadZipFile as error:
            raise UserError(f"{place} is not a complete zip archive ({error}); download it again") from None
        lists = sorted((name for name in names if Path(name).name == "wnids.txt"), key=len)
        if not lists:
            raise UserError(f"{place} is not tiny-imagenet-200: it has no wnids.txt")
        self.root = lists[0].removesuffix("wnids.txt")
        self.names = {name.removeprefix(self.root) for name in names if name.startswith(self.root)}

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            UserError: the file is missing or corrupt.
        """
        if name not in self.names:
            raise UserError(f"{self.place} is incomplete: it has no {self.root}{name}; download it again")
        try:
            if self.zip is None:
                return (self.place / self.root / name).read_bytes()
            size = self.zip.getinfo(self.root + name).file_size
            if size > LARGEST_FILE:
                raise UserError(f"{self.place} is not tiny-imagenet-200: {name} would unpack to {size} bytes")
            return self.zip.read(self.root + name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: encrypted
            raise UserError(f"{self.place} is corrupt ({error}); download it again") from None

    def rows(self, name: str) -> list[list[str]]:
        """Return the words of each line of a text file.

        Raises:
            UserError: the file is missing or not a text file.
        """
        try:
            return [line.split() for line in self.read(name).decode().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.place} is corrupt ({name}: {error}); download it again") from None


def make_tinyimagenet(archive: str | os.PathLike[str], out: str | os.PathLike[str] = "datasets/tinyimagenet") -> bool:
    """Sort the images of Tiny ImageNet into class folders, unless the folder already contains them.

    Args:
        archive: tiny-imagenet-200.zip, or the unpacked folder.
        out: the folder to create. It is renamed into place when it is complete.

    Returns:
        Whether files were written.

    Raises:
        UserError: the archive is missing, corrupt or incomplete, or the folder contains other files.
    """

    def write(folder: Path, settings: dict[str, Any]) -> None:
        _write_tinyimagenet(folder, settings, _Archive(Path(archive)))

    return _make(Path(out), {"dataset": "tinyimagenet", "size": 64}, write)


def _write_tinyimagenet(folder: Path, settings: dict[str, Any], archive: _Archive) -> None:
    from tqdm import tqdm

    classes = [row[0] for row in archive.rows("wnids.txt")]
    for name in classes:  # the archive is not trusted: it must not write outside of the folder
        if Path(name).parts != (name,) or name == "..":
            raise UserError(f"{archive.place} contains an invalid class name: {name}")
    images = [
        (f"train/{name}/images/{row[0]}", f"train/{name}/{row[0]}")
        for name in classes
        for row in archive.rows(f"train/{name}/{name}_boxes.txt")
    ]
    counts = {"train": len(images)}
    for row in archive.rows("val/val_annotations.txt"):
        if len(row) < 2 or row[1] not in classes:
            raise UserError(f"val_annotations.txt has a class that is not in wnids.txt: {' '.join(row[1:2])}")
        images.append((f"val/images/{row[0]}", f"val/{row[1]}/{row[0]}"))
    counts["val"] = len(images) - counts["train"]
    for _, target in images:
        if len(Path(target).parts) != 3 or ".." in Path(target).parts:
            raise UserError(f"{archive.place} contains an invalid image name: {target}")
    if 0 in counts.values():
        raise UserError(f"{archive.place} lists no {min(counts, key=lambda split: counts[split])} images")
    for split in counts:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
    for source, target in tqdm(images, desc="tinyimagenet", unit=" images", disable=None):
        (folder / target).write_bytes(archive.read(source))
    manifest = {**settings, "classes": len(classes), "counts": counts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


LARGEST_FILE = 2**26
"""Size in bytes of the largest file that is unpacked; files of Tiny ImageNet have at most a few hundred kilobytes."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File extensions of images, as in torchvision's ImageFolder, and .webp."""


def make_subset(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fraction: float | None = None,
    names: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> bool:
    """Create a folder with a subset of the labelled images, unless it already exists.

    Args:
        source: folder with one subfolder of images per class.
        out: the folder to create. It is renamed into place when it is complete.
        fraction: fraction of all images, in (0, 1], with the same number per class, at least one. With the same seed,
            a smaller subset is contained in a larger one.
        names: a text file that lists the images instead, one per line, with or without their class folder.
        seed: seed of the random selection, >= 0.

    Returns:
        Whether files were written.

    Raises:
        UserError: an image is missing, a class has too few images, a setting is out of range, or the folder contains
            other files.
    """
    if (fraction is None) == (names is None):
        raise UserError("a subset needs either --fraction or --names")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"fraction must be above 0 and at most 1, got {fraction}")
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}")
    images = _images(Path(source))
    chosen = _named(images, Path(names)) if names is not None else _drawn(images, fraction or 1.0, seed)
    digest = hashlib.sha256("\n".join(f"{label}/{name}" for label in chosen for name in chosen[label]).encode())
    settings = {
        "dataset": "subset",
        "source": str(Path(source).resolve()),
        "fraction": fraction,
        "seed": seed if names is None else None,
        "sha256_of_names": digest.hexdigest(),
    }

    def write(folder: Path, settings: dict[str, Any]) -> None:
        for label, files in chosen.items():
            (folder / label).mkdir(parents=True)
            for name in files:
                origin = (Path(source) / label / name).resolve()
                try:
                    os.link(origin, folder / label / name)
                except OSError:
                    shutil.copyfile(origin, folder / label / name)
        counts = {label: len(files) for label, files in chosen.items()}
        manifest = {**settings, "classes": len(chosen), "counts": {"images": sum(counts.values())}, "of_class": counts}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    return _make(Path(out), settings, write)


def _images(source: Path) -> dict[str, list[str]]:
    """Return class → names of its images, both sorted."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    found = {
        folder.name: sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        for folder in sorted(source.iterdir())
        if folder.is_dir()
    }
    if not any(found.values()):
        raise UserError(f"{source} holds no class folders with images")
    return found


def _drawn(images: dict[str, list[str]], fraction: float, seed: int) -> dict[str, list[str]]:
    import numpy as np

    each = max(1, round(fraction * sum(map(len, images.values())) / len(images)))
    drawn = {}
    for index, (label, files) in enumerate(images.items()):
        if len(files) < each:
            raise UserError(f"class {label} has {len(files)} images, but the fraction needs {each} per class")
        order = np.random.default_rng([seed, index]).permutation(len(files))
        drawn[label] = sorted(files[place] for place in order[:each])
    return drawn


def _named(images: dict[str, list[str]], names: Path) -> dict[str, list[str]]:
    try:
        wanted = [Path(line.strip()) for line in names.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{names} is not a readable list of images: {error}") from None
    labels: dict[str, list[str]] = {}
    for label, files in images.items():
        for name in files:
            labels.setdefault(name, []).append(label)
    chosen: dict[str, set[str]] = {label: set() for label in images}
    for path in wanted:
        known = [label for label in labels.get(path.name, []) if len(path.parts) == 1 or path.parent.name == label]
        if len(known) != 1:
            raise UserError(f"{names} lists {path}, which must exist once in the source, got {len(known)} files")
        chosen[known[0]].add(path.name)
    return {label: sorted(files) for label, files in chosen.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    program = with_command_name("python -m plugins.tools.data", "plugins.tools.data")
    parser = argparse.ArgumentParser(prog=program, description="Create a data set in class folders.")
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    digits = commands.add_parser("digits", help="1797 real handwritten digits, rendered with random placement")
    digits.add_argument("--out", default="datasets/digits", help="folder to create (default: %(default)s)")
    digits.add_argument("--size", type=int, default=16, help="side of the images in pixels (default: %(default)s)")
    digits.add_argument("--seed", type=int, default=0, help="seed of rendering and split (default: %(default)s)")
    tiny = commands.add_parser("tinyimagenet", help="Tiny ImageNet, sorted into class folders")
    tiny.add_argument("--archive", required=True, help="tiny-imagenet-200.zip, or the unpacked folder")
    tiny.add_argument("--out", default="datasets/tinyimagenet", help="folder to create (default: %(default)s)")
    part = commands.add_parser("subset", help="a fraction of the images of class folders, such as 1 %% or 10 %%")
    part.add_argument("--source", required=True, help="class folders with images, such as datasets/imagenet/train")
    part.add_argument("--out", required=True, help="folder to create, such as datasets/imagenet/train_1")
    part.add_argument("--fraction", type=float, help="fraction of all images, balanced over classes, such as 0.01")
    part.add_argument("--names", help="text file that lists the images, one per line; replaces --fraction")
    part.add_argument("--seed", type=int, default=0, help="seed of the random selection (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.dataset == "digits":
            written = make_digits(options.out, size=options.size, seed=options.seed)
        elif options.dataset == "tinyimagenet":
            written = make_tinyimagenet(options.archive, options.out)
        else:
            chosen = {"fraction": options.fraction, "names": options.names, "seed": options.seed}
            written = make_subset(options.source, options.out, **chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    manifest = json.loads((Path(options.out) / "manifest.json").read_text())
    counts = ", ".join(f"{split} {count}" for split, count in manifest["counts"].items())
    state = "written" if written else "already there"
    seed = f", seed {manifest['seed']}" if manifest.get("seed") is not None else ""
    what = f"{manifest['size']} px" if "size" in manifest else f"{manifest['classes']} classes"
    print(f"{options.out}: {state} ({counts}; {what}{seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
