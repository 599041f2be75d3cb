"""VISSL's stock configurations run, and resume to the same numbers; the commands are those of docs/vissl_stock.md."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.vissl, pytest.mark.slow]

PAGE = (Path(__file__).parents[2] / "docs" / "vissl_stock.md").read_text()
COMMON = re.findall(r"^    (config\S+)$", PAGE, re.MULTILINE)
SHORT = {name: re.search(rf"\b{name}\s+for\s+`([\w.]+)`", PAGE).group(1) for name in ("SMALL", "LR", "NCE")}
ROWS = {
    method: (config, [re.sub(r"^(SMALL|LR|NCE)\b", lambda m: SHORT[m[1]], word) for word in overrides.split()])
    for method, config, overrides in re.findall(
        r"^\| ([^|]+?) \| (pretrain/\S+) \| ([^|]*=[^|]*) \|$", PAGE, re.MULTILINE
    )
}
WANTED = (
    "SimCLR",
    "SwAV",
    "MoCo",
    "Barlow Twins",
    "DINO, DeiT",
    "DeepCluster v2",
    "PIRL, jigsaw and memory bank",
    "NPID",
)


def command(method: str, few_digits: Path, folder: Path, epochs: int) -> list[str]:
    config, overrides = ROWS[method]
    words = [f"config={config}", *COMMON, *overrides, f"config.CHECKPOINT.DIR={folder}"]
    words = [word.replace("datasets/digits", str(few_digits)) for word in words]
    return [word.replace("num_epochs=1", f"num_epochs={epochs}") for word in words]


@pytest.fixture(scope="module")
def trained(few_digits: Path, tmp_path_factory: pytest.TempPathFactory, launches: Callable) -> dict[str, tuple]:
    """Method → the result of its command, and the run's folder."""
    folder = tmp_path_factory.mktemp("stock")
    rng = np.random.default_rng(0)
    np.save(folder / "permutations.npy", np.stack([rng.permutation(9) for _ in range(20)]))
    places = {method: folder / re.sub(r"\W", "_", method) for method in ROWS}
    jobs = [{"argv": command(method, few_digits, place, 1), "folder": str(folder)} for method, place in places.items()]
    return {method: (result, places[method]) for method, result in zip(ROWS, launches(jobs), strict=True)}


def test_page_has_the_methods_that_vissl_is_known_for():
    assert len(COMMON) == 5
    assert set(WANTED) <= set(ROWS)


@pytest.mark.parametrize("method", ROWS)
def test_two_iterations_and_a_checkpoint(method, trained):
    result, folder = trained[method]
    assert result["status"] == 0, result["output"][-3000:]
    saved = torch.load(folder / "checkpoint.torch", weights_only=False)
    assert saved["iteration"] == 2
    loss = float(re.search(r"epoch 1/1  train loss (\S+)", result["output"]).group(1))
    assert 0 < loss < 100
    log = (folder / "log.txt").read_text()
    assert "Starting training" in log and "Starting training" not in result["output"]


def tensors(value, name=""):
    """The tensors in nested dictionaries and lists, by their place."""
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in tensors(entry, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return tensors(dict(enumerate(value)), name)
    return {name: value} if torch.is_tensor(value) else {}


@pytest.mark.parametrize("methods", [("MoCo", "DINO, DeiT")])  # two kinds of momentum encoder
def test_killed_training_resumes_to_the_same_checkpoint(methods, few_digits, tmp_path, launches):
    jobs = []
    for number, method in enumerate(methods):
        for kind in ("whole", "cut", "cut"):
            place = tmp_path / f"{number}_{kind}"
            argv = [*command(method, few_digits, place, 2), "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1"]
            jobs.append({"argv": argv, "folder": str(tmp_path)})
        jobs[-2]["when"] = str(tmp_path / f"{number}_cut" / "model_phase0.torch")
    results = launches(jobs)
    for number, method in enumerate(methods):
        whole, killed, resumed = results[3 * number : 3 * number + 3]
        assert (whole["status"], killed["status"], resumed["status"]) == (0, -9, 0), (method, resumed["output"][-3000:])
        assert "resumed after 2 of 4 iterations" in resumed["output"], method
        name = "model_final_checkpoint_phase1.torch"
        one, other = (
            tensors(torch.load(tmp_path / f"{number}_{kind}" / name, weights_only=False)) for kind in ("whole", "cut")
        )
        assert one.keys() == other.keys() and len(one) > 100, method
        different = [key for key in one if not torch.equal(one[key], other[key])]
        assert not different, (method, different[:5])
