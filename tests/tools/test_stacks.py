"""Stacks: geometry of the patches, order, turns, steps of each patch, DataLoader workers."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from plugins.tools.stacks import Grid, Jigsaw, Photometric, Rotation, Stack


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _coordinates(side):
    """An image whose colours encode the position of each pixel: red is the column, green the row."""
    column, row = np.meshgrid(np.arange(side), np.arange(side))
    return Image.fromarray(np.stack([column, row, 0 * row], 2).astype(np.uint8))


def _corners(patch):
    left, top, _ = patch.getpixel((0, 0))
    right, bottom, _ = patch.getpixel((patch.width - 1, patch.height - 1))
    return left, top, right, bottom


def _whole(jigsaw):
    """Disable the random crop."""
    jigsaw.crop = lambda image: image
    return jigsaw


def test_windows_lie_in_their_cells_and_reach_all_places_in_random_order():
    side, window, grid = 24, 5, 3
    jigsaw, image = _whole(Jigsaw(side, window, grid)), _coordinates(side)
    places, first = {axis: Counter() for axis in ("left", "top")}, Counter()
    for _ in range(400):
        seen = []
        for patch in jigsaw(image):
            left, top, right, bottom = _corners(patch)
            assert patch.size == (5, 5) and (right - left, bottom - top) == (4, 4)
            assert left // 8 == right // 8 and top // 8 == bottom // 8, "inside one cell"
            places["left"][left % 8] += 1
            places["top"][top % 8] += 1
            seen.append((top // 8, left // 8))
        assert len(set(seen)) == 9, "each cell once"
        first[seen[0]] += 1
    for counts in places.values():
        assert set(counts) == {0, 1, 2, 3}, "both ends are reached (21 of VISSL's 0...21 is not)"
        assert all(abs(count - 900) < 150 for count in counts.values())
    assert len(first) == 9 and all(abs(count - 400 / 9) < 35 for count in first.values())


def test_offsets_of_patches_are_independent():
    jigsaw, image = _whole(Jigsaw(24, 5, 3)), _coordinates(24)
    assert any(len({_corners(patch)[0] % 8 for patch in jigsaw(image)}) > 1 for _ in range(5))


def test_without_permutation_the_order_is_row_by_row():
    jigsaw = _whole(Jigsaw(24, 8, 3, permute=False))
    corners = [_corners(patch)[:2] for patch in jigsaw(_coordinates(24))]
    assert corners == [(x, y) for y in (0, 8, 16) for x in (0, 8, 16)]


def test_the_crop_takes_the_given_share_of_the_image():
    areas = []
    jigsaw = Jigsaw(60, 20, 3, scale=(0.6, 1.0), permute=False, interpolation=T.InterpolationMode.NEAREST)
    for _ in range(200):
        patches = jigsaw(_coordinates(200))
        width = _corners(patches[2])[2] - _corners(patches[0])[0]
        height = _corners(patches[6])[3] - _corners(patches[0])[1]
        areas.append(width * height / 200**2)
    assert 0.5 < min(areas) < 0.68 and 0.9 < max(areas) <= 1


def test_a_view_is_turned_by_each_quarter():
    image = _coordinates(16)
    rotation = Rotation(16)
    rotation.crop = lambda view: view
    quarters = [image.rotate(angle) for angle in (0, 90, 180, 270)]
    counts = Counter()
    for _ in range(200):
        (view,) = rotation(image)
        counts[quarters.index(view)] += 1
    assert sorted(counts) == [0, 1, 2, 3] and min(counts.values()) > 25


def test_every_patch_has_steps_of_its_own():
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    stack = Stack(Jigsaw(24, 8, 3), T.Compose([T.ColorJitter(0.8, 0.8, 0.8, 0.4), T.ToTensor()]))(image)
    assert stack.shape == (9, 3, 8, 8)
    assert len({tuple(patch[:, 0, 0].tolist()) for patch in stack}) == 9


def test_photometric_changes_an_image_with_its_probability():
    image = Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    changed = sum(Photometric(0.66)(image) is not image for _ in range(500))
    assert changed == pytest.approx(330, abs=50)
    assert Photometric(0.0)(image) is image
    assert len({Photometric(1.0)(image).tobytes() for _ in range(20)}) > 10


class _Photos(Dataset):
    def __init__(self):
        each = T.Compose([T.ColorJitter(0.4, 0.4, 0.8, 0.5), Photometric(0.5), T.ToTensor()])
        self.transform = Stack(Jigsaw(20, 8, 2), each)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(_coordinates(32))


@pytest.mark.slow
def test_seeded_workers_are_deterministic_and_differ():
    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([*DataLoader(_Photos(), batch_size=None, num_workers=2, generator=generator)])

    one, again, other = epoch(0), epoch(0), epoch(1)
    assert one.shape == (8, 4, 3, 8, 8)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1]), "two workers"


def test_transforms_can_be_sent_to_workers_and_shown():
    for transform in (Stack(Jigsaw(), T.Compose([Photometric(), T.ToTensor()])), Rotation()):
        assert repr(pickle.loads(pickle.dumps(transform))) == repr(transform)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Jigsaw(256, 64, 3), "side must be a multiple of grid = 3, got 256; 255 is one"),
        (lambda: Jigsaw(255, 86, 3), "window must be at most side / grid = 85 pixels, got 86"),
        (lambda: Jigsaw(255, 0, 3), "window must be in [1, inf)"),
        (lambda: Jigsaw(255.0, 64, 3), "side must be an integer, got 255.0"),
        (lambda: Jigsaw(scale=(0.6, 1.2)), "scale[1] must be in [1e-06, 1]"),
        (lambda: Jigsaw(scale=(1.0, 0.6)), "scale must be (smallest, largest), got (1.0, 0.6)"),
        (lambda: Rotation(0), "side must be in [1, inf)"),
        (lambda: Photometric(1.5), "p must be in [0, 1]"),
    ],
)
def test_mistakes_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)


def test_a_grid_is_cut_row_by_row_from_one_crop():
    image = _coordinates(16)
    grid = Grid(16, 8, 4, scale=(1.0, 1.0))
    grid.crop = lambda image: image  # the crop has tests of torchvision's own
    patches = grid(image)
    assert len(patches) == grid.count == 9
    for place, patch in enumerate(patches):
        row, column = divmod(place, 3)
        assert patch.tobytes() == image.crop((4 * column, 4 * row, 4 * column + 8, 4 * row + 8)).tobytes()


def test_a_flip_mirrors_all_patches_together():
    image = _coordinates(16)
    kept = [Grid(16, 8, 4, scale=(1.0, 1.0), flip=flip) for flip in (0.0, 1.0)]
    for grid in kept:
        grid.crop.transforms[0] = lambda image: image
    (plain, turned) = (grid(image) for grid in kept)
    for place, patch in enumerate(turned):
        row, column = divmod(place, 3)
        assert patch.tobytes() == ImageOps.mirror(plain[3 * row + 2 - column]).tobytes()


def test_a_window_keeps_the_pixels_in_their_places():
    torch.manual_seed(0)
    image, grid = Image.new("L", (16, 16), 255), Grid(16, 8, 4, window=6)
    corners = set()
    for _ in range(40):
        for patch in grid(image):
            pixels = T.functional.pil_to_tensor(patch)[0] > 0
            assert int(pixels.sum()) == 36
            rows, columns = (pixels.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            corners.add((rows[0], columns[0]))
            assert rows == [*range(rows[0], rows[0] + 6)] and columns == [*range(columns[0], columns[0] + 6)]
    assert corners == {(i, j) for i in range(3) for j in range(3)}


def test_padding_enlarges_the_image_before_the_crop():
    torch.manual_seed(0)
    image = Image.new("L", (16, 16), 255)
    (patch,) = Grid(24, 24, 1, scale=(1.0, 1.0), padding=4)(image)
    assert T.functional.pil_to_tensor(patch)[0, :3].max() == 0 and Grid(16, 8, 4)(image)[0].getextrema()[0] == 255


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Grid(16, 8, 3), "side - patch must be a multiple of the distance"),
        (lambda: Grid(16, 8, 4, window=9), "window must be an integer from 1 to patch = 8, or None, got 9"),
        (lambda: Grid(16, 8, 4, flip=1.5), "flip must be in [0, 1]"),
        (lambda: Grid(16, 8, 4, padding=-1), "padding must be in [0, inf)"),
    ],
)
def test_mistakes_in_a_grid_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)
