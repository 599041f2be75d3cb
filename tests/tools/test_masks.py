"""Masks: pixels of the background, the mask of an image, errors, random draws."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from plugins.tools.command import UserError
from plugins.tools.images import open_image, path_of, with_path
from plugins.tools.masks import RemoveBackground

SIZE = (12, 8)


def _save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """images/cat/1.png, of random colours, and its mask: the object is the right half."""
    width, height = SIZE
    _save(tmp_path / "images" / "cat" / "1.png", np.random.default_rng(0).integers(256, size=(height, width, 3)))
    mask = np.zeros((height, width))
    mask[:, width // 2 :] = 255
    _save(tmp_path / "masks" / "cat" / "1.png", mask)
    return tmp_path


def _remove(folders, **options):
    return RemoveBackground(folders / "masks", folders / "images", **options)


def _image(folders, name="cat/1.png"):
    return open_image(folders / "images" / name)


@pytest.mark.parametrize(("fill", "level"), [("gray", 128), ("black", 0), ("random", None)])
def test_the_background_is_one_grey_level_and_the_object_is_unchanged(folders, fill, level):
    torch.manual_seed(0)
    image = _image(folders)
    before = np.asarray(image).copy()
    levels = set()
    for _ in range(20):
        changed = np.asarray(_remove(folders, prob=1.0, fill=fill)(image))
        assert (changed[:, 6:] == before[:, 6:]).all()
        (found,) = np.unique(changed[:, :6])
        levels.add(int(found))
    assert (np.asarray(image) == before).all(), "the image itself may be read again"
    assert levels == {level} if level is not None else len(levels) > 10


def test_the_background_is_removed_with_the_given_probability_and_equal_draws_for_any_probability(folders):
    image, counts = _image(folders), {}
    for prob in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        remove = _remove(folders, prob=prob, fill="black")
        counts[prob] = sum(remove(image) is not image for _ in range(1000))
        after = torch.rand(())
    assert counts[0.0] == 0 and counts[1.0] == 1000 and abs(counts[0.3] - 300) < 50
    torch.manual_seed(0)
    for _ in range(1000):
        _remove(folders, prob=0.0)(image)
    assert torch.rand(()) == after


@pytest.mark.parametrize("name", ["1.png", "1.PNG", "1.bmp", "1.tif", "1.webp"])
def test_a_mask_has_the_name_of_the_image_and_any_suffix(folders, name):
    shutil.copy(folders / "images" / "cat" / "1.png", folders / "images" / "cat" / "1.jpg.png")
    image = folders / "images" / "cat" / "1.jpeg"
    Image.open(folders / "images" / "cat" / "1.png").save(image)
    mask = folders / "masks" / "cat" / "1.png"
    if name != mask.name:
        with Image.open(mask) as found:
            found.save(mask.with_name(name), **({"lossless": True} if name.endswith("webp") else {}))
        mask.unlink()
    remove = _remove(folders, prob=1.0)
    remove.check([str(image)])
    assert remove.mask_path(str(image)) == str(mask.with_name(name))


def test_links_to_the_folder_of_images_are_followed(folders):
    (folders / "link").symlink_to("images")
    remove = RemoveBackground(folders / "masks", folders / "link", prob=1.0, fill="black")
    for place in ("link", "images"):
        assert remove(open_image(folders / place / "cat" / "1.png")).getpixel((0, 0)) == (0, 0, 0)
    remove.check()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_black_is_background_in_any_mode(folders, mode):
    path = folders / "masks" / "cat" / "1.png"
    with Image.open(path) as mask:
        values = np.asarray(mask)
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16) * 257).save(path)
    elif mode == "P":
        palette = Image.fromarray((values > 0).astype(np.uint8) * 3).convert("P")
        palette.putpalette([0, 0, 0, 9, 9, 9, 5, 5, 5, 0, 0, 64])
        palette.save(path)
    else:
        Image.fromarray(values).convert(mode).save(path)
    changed, before = np.asarray(_remove(folders, prob=1.0, fill="gray")(_image(folders))), np.asarray(_image(folders))
    assert (changed[:, :6] == 128).all() and (changed[:, 6:] == before[:, 6:]).all()


def test_transparent_pixels_and_small_numbers_are_read_as_they_are(folders, monkeypatch):
    """A cut-out whose background is white but transparent; a 16-bit file that marks the object with 1; floats."""
    width, height = SIZE
    path = folders / "masks" / "cat" / "1.png"
    object_ = np.zeros((height, width), dtype=np.uint8)
    object_[:, 6:] = 1
    cut_out = np.full((height, width, 4), 255, dtype=np.uint8)
    cut_out[..., 3] = 255 * object_
    Image.fromarray(cut_out).save(path)
    remove = _remove(folders, prob=1.0, fill="black")
    image = _image(folders)
    expected = np.asarray(image) * object_[..., None]
    assert (np.asarray(remove(image)) == expected).all()
    Image.fromarray(object_.astype(np.uint16)).save(path)
    assert (np.asarray(remove(image)) == expected).all()
    path.unlink()
    Image.fromarray(object_.astype(np.float32) / 1000).save(path.with_suffix(".tif"))
    assert (np.asarray(remove(image)) == expected).all()
    (path.with_suffix(".tif")).unlink()
    noisy = np.where(object_ == 1, 250, 9).astype(np.uint8)
    Image.fromarray(noisy).save(path.with_suffix(".webp"), quality=50)
    assert (np.asarray(remove(image)) == expected).all()
    monkeypatch.chdir(folders)
    relative = RemoveBackground("masks", "images", prob=1.0)
    monkeypatch.chdir("/")
    assert relative.mask_path(str(folders / "images/cat/1.png"))


def test_a_mask_is_upright_like_its_image(folders):
    """Pillow turns a TIFF file with an orientation when it is loaded, and other files not."""
    path, image = folders / "masks" / "cat" / "1.png", _image(folders)
    expected = np.asarray(_remove(folders, prob=1.0, fill="black")(image))
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    turned = Image.open(path).rotate(180)
    path.unlink()
    for suffix in (".tif", ".png"):
        turned.save(path.with_suffix(suffix), exif=exif)
        assert (np.asarray(_remove(folders, prob=1.0, fill="black")(image)) == expected).all(), suffix
        path.with_suffix(suffix).unlink()


def test_the_noise_of_a_jpeg_mask_is_background(folders):
    path = folders / "masks" / "cat" / "1.png"
    with Image.open(path) as mask:
        blurred = np.asarray(mask.convert("L")).copy()
    blurred[0, 0], path_jpeg = 40, path.with_suffix(".jpg")
    path.unlink()
    _save(path_jpeg, blurred, quality=60)
    changed = np.asarray(_remove(folders, prob=1.0, fill="gray")(_image(folders)))
    assert (changed[:, :6] == 128).all()


def test_a_mask_of_another_size_is_stretched_and_a_turned_one_is_refused(folders):
    path, image = folders / "masks" / "cat" / "1.png", _image(folders)
    expected = np.asarray(_remove(folders, prob=1.0, fill="gray")(image))
    _save(path, [[0, 7]])
    assert (np.asarray(_remove(folders, prob=1.0, fill="gray")(image)) == expected).all()
    _save(path, np.zeros(SIZE))
    with pytest.raises(UserError, match="has 8 x 12 pixels, but the upright image has 12 x 8"):
        _remove(folders, prob=1.0)(image)


def test_the_path_survives_conversion_and_crops_and_is_not_read_from_the_file(folders):
    image = _image(folders)
    assert path_of(image.convert("L").resize((4, 4)).crop((0, 0, 2, 2))) == str(folders / "images" / "cat" / "1.png")
    assert path_of(with_path(image, b"bytes")) is None
    with (folders / "images" / "cat" / "1.png").open("rb") as file:
        assert path_of(open_image(file)) == file.name
    images = ImageFolder(str(folders / "images"), loader=open_image, transform=_remove(folders, prob=1.0, fill="black"))
    assert images[0][0].getpixel((0, 0)) == (0, 0, 0)


def test_missing_masks_are_counted_and_the_first_is_named(folders):
    for name in ("cat/2.png", "dog/3.jpg"):
        target = folders / "images" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folders / "images" / "cat" / "1.png", target)
    first = folders / "images" / "cat" / "2.png"
    with pytest.raises(UserError, match=r"2 of 3 images have no mask .*cat/2.png, whose mask would be .*cat/2\.png"):
        _remove(folders).check()
    _remove(folders).check([str(folders / "images" / "cat" / "1.png")])
    with pytest.raises(UserError, match=f"{first} has no mask: there is no .*masks/cat/2.png"):
        _remove(folders, prob=1.0)(_image(folders, "cat/2.png"))


def test_what_cannot_be_used_is_refused_in_one_sentence(folders):
    for masks, images, message in (
        ("none", "images", "folder of masks does not exist"),
        ("masks", "none", "folder of images does not exist"),
        ("images", "images", "must be another one"),
    ):
        with pytest.raises(UserError, match=message):
            RemoveBackground(folders / masks, folders / images)
    for options in ({"prob": 1.5}, {"fill": "white"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            _remove(folders, **options)
    remove = _remove(folders, prob=0.0)
    with pytest.raises(UserError, match="no path"):
        remove(Image.new("RGB", SIZE))
    with pytest.raises(UserError, match="is not in"):
        _remove(folders, prob=1.0)(with_path(Image.new("RGB", SIZE), str(folders / "masks" / "cat" / "1.png")))
    (folders / "masks" / "cat" / "1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"masks/cat/1.png cannot be read"):
        _remove(folders, prob=1.0)(_image(folders))
