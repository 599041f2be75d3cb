"""Fixtures of the whole suite."""

import gc
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from plugins.testing import RankPool, read_yaml_fast

read_yaml_fast()  # Hydra reads thousands of files in the tests
gc.disable()  # until the tests are collected: imports and collection make no garbage worth a search


def pytest_collection_finish() -> None:
    """Exclude the objects of imports and of the collection from garbage collection.

    There are a million of them, and VISSL collects garbage several times in each run. Forked processes would copy them.
    """
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Undo ``gc.freeze``. Compiled libraries would report these objects as leaks when the process ends."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases that ``--fast`` leaves out, and sort the files.

    Several workers (pytest-xdist) start with the files that hold the most slow tests. A worker takes a whole file
    (``--dist loadfile``): if a file of minutes came last, the other workers would be idle.
    """
    _mark_further_cases(config, items)
    if not hasattr(config, "workerinput"):
        return
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += 10 if item.get_closest_marker("slow") else 3 if item.get_closest_marker("ddp") else 0
    items.sort(key=lambda item: -weights[item.path])  # stable: files of equal weight keep their order


CASES = 6
"""Number of cases of a test that ``--fast`` runs if the test has no marker ``sample``."""


def _mark_further_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the marker ``more`` to the cases that ``--fast`` leaves out.

    It keeps the cases that the marker ``sample`` of a test names. Without this marker it keeps CASES of them, at equal
    distances.
    """
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if callspec := getattr(item, "callspec", None):
            tests[item.nodeid.removesuffix(f"[{callspec.id}]")].append(item)
    without = []
    for name, cases in tests.items():
        marker = cases[0].get_closest_marker("sample")
        if marker is None:
            kept = [
                not number or number * CASES // len(cases) > (number - 1) * CASES // len(cases)
                for number in range(len(cases))
            ]
        else:
            kept = [any(fnmatchcase(case.callspec.id, pattern) for pattern in marker.args) for case in cases]
            if not any(kept):
                without.append(name)
        for case, is_kept in zip(cases, kept, strict=True):
            if not is_kept:
                case.add_marker("more")
    if without and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"the marker sample names no case of {', '.join(without)}")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Undo what a test leaves behind: Lightning's DDP writes LOCAL_RANK and WORLD_SIZE, and keeps its process group."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Three processes in one gloo group; see :mod:`plugins.testing`."""
    with RankPool(timeout=600) as pool:  # a busy machine imports a framework for minutes
        yield pool


@pytest.fixture(scope="session")
def differing_loads(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """differing_loads(content, network) → the ways to load a checkpoint whose features are not those of the network."""
    from plugins.tools.export import export
    from plugins.tools.hub import load_weights

    @torch.no_grad()
    def differing(content: dict, network: torch.nn.Module, arch: str | None = None, timm: bool = False) -> list[str]:
        folder = tmp_path_factory.mktemp("loads")
        torch.save(content, folder / "run.ckpt")
        targets = ("torchvision", *(("timm",) if timm else ()))
        for target in targets:
            export(folder / "run.ckpt", target, folder / target, arch)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        expected = network.eval()(images)
        found = {name: load_weights(folder / name, arch)(images) for name in ("run.ckpt", *targets)}
        return [name for name, value in found.items() if not torch.allclose(value, expected, rtol=1e-6, atol=1e-6)]

    return differing


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``python -m plugins.tools.data digits`` makes. Copy it; do not change it."""
    from plugins.tools.data import make_digits

    full = tmp_path_factory.mktemp("full") / "digits"
    make_digits(full)
    return full


@pytest.fixture(scope="session")
def thin_digits(all_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """thin_digits(train, val) → a folder datasets/digits with so many of the real digits, spread over the classes."""

    def thin(train: int, val: int) -> Path:
        few = tmp_path_factory.mktemp("few") / "datasets" / "digits"
        for split, count in (("train", train), ("val", val)):
            classes = sorted((all_digits / split).iterdir())
            for index in range(count):
                folder = classes[index % 10]
                source = sorted(folder.iterdir())[index // 10]
                target = few / split / folder.name / source.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        return few

    return thin


@pytest.fixture(scope="session")
def black_masks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """black_masks(images) → a folder of masks by which all pixels of these images are background."""
    from PIL import Image

    def masks(images: Path) -> Path:
        folder = tmp_path_factory.mktemp("masks")
        for image in images.rglob("*.png"):
            target = folder / image.relative_to(images)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16)).save(target)
        return folder

    return masks
