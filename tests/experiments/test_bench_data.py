"""The benchmark of the image readers times both, and explains mistakes."""

import json

import pytest
import torch
from PIL import Image

from plugins.experiments.bench import main
from plugins.experiments.bench_data import bench_data, make_jpegs

pytestmark = pytest.mark.solo


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    make_jpegs(folder, 24, side=64)
    return folder


def test_images_are_jpegs_of_the_size_of_photographs(tmp_path):
    make_jpegs(tmp_path, 2)
    files = sorted(tmp_path.glob("class*/*.jpg"))
    assert len(files) == 2
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (256, 256), "RGB")
        assert 10_000 < file.stat().st_size < 60_000


@pytest.mark.slow
def test_ratio_is_of_the_same_work(jpegs):
    result = bench_data(jpegs, batch_size=4, workers=1, crop=16, batches=3, rounds=3)
    assert (result.images, result.crop, result.batch_size, result.device) == (24, 16, 4, "cpu")
    assert len(result.rounds) == 3 and all(loader > 0 and dali > 0 for loader, dali in result.rounds)
    assert min(dali / loader for loader, dali in result.rounds) <= result.ratio
    assert result.ratio <= max(dali / loader for loader, dali in result.rounds)


def test_command_prints_and_writes(jpegs, tmp_path, capsys):
    small = ["--batch-size", "4", "--workers", "1", "--crop", "16", "--batches", "2", "--rounds", "1"]
    assert main(["data", "--images", str(jpegs), *small, "--json", str(tmp_path / "new" / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 24 | 16 | 4 | 1 | cpu |")
    assert json.loads((tmp_path / "new" / "b.json").read_text())["results"][0]["images"] == 24


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--images", "none"], "error: data.train_path is not a folder"),
        (["--images", "JPEGS", "--device", "gpu", "--batch-size", "4"], "this machine has no GPU"),
        (["--images", "JPEGS", "--batch-size", "16"], "at least two batches of 16, got 24 images"),
        (["--rounds", "0"], "argument --rounds: must be an integer, at least 1, got '0'"),
    ],
)
def test_command_explains_mistakes(jpegs, capsys, monkeypatch, options, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["data", *(str(jpegs) if word == "JPEGS" else word for word in options)])
    assert sentence in capsys.readouterr().err
