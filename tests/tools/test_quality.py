"""Label-free quality of files and checkpoints, and its report."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.experiments import quality_report
from plugins.metrics import Quality
from plugins.tools import quality
from plugins.tools.features import save_features
from plugins.tools.resnet8 import resnet8

VIEWS = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))


def _weights(path, seed: int = 0):
    """Write a checkpoint of an untrained ResNet-8, and return its network."""
    torch.manual_seed(seed)
    model = resnet8()
    model.fc = torch.nn.Identity()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in model.state_dict().items()}}, path)
    return model.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder with train and val: two classes of six noise images each, with a brightness of their own."""
    folder, drawn = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name, low in (("dark", 0), ("light", 150)):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = drawn.integers(low, low + 100, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def _json(capsys, *words) -> dict[str, float | None]:
    assert quality.main([*map(str, words), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    return found


def _expected(views) -> dict[str, float | None]:
    exact = Quality()
    exact.update(views)
    values = {name: value.item() for name, value in exact.values()._asdict().items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def test_files_of_features(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", VIEWS[0].numpy())
    np.save(tmp_path / "views.npy", VIEWS.numpy())
    save_features(tmp_path / "folder", "test", "res5", VIEWS[0], torch.arange(30))
    np.savez(tmp_path / "one.npz", VIEWS[0].numpy())
    np.savez(tmp_path / "named.npz", targets=np.arange(30), features=VIEWS[0].double().numpy())
    torch.save(VIEWS[0], tmp_path / "tensor.pt")
    torch.save({"features": VIEWS, "targets": torch.arange(30)}, tmp_path / "views.pt")
    single = pytest.approx(_expected([VIEWS[0]]))
    assert single != _expected([*VIEWS])
    for name in ("rows.npy", "one.npz", "named.npz", "tensor.pt"):
        assert _json(capsys, tmp_path / name) == single, name
    assert _json(capsys, tmp_path / "folder", "--split", "test") == single
    for name in ("views.npy", "views.pt"):
        assert _json(capsys, tmp_path / name) == pytest.approx(_expected([*VIEWS])), name
    quality.main([str(tmp_path / "rows.npy"), str(tmp_path / "views.npy")])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["source", "rankme"] and len(lines) == 2 and "–" in lines[0]


def test_a_checkpoint_on_images(tmp_path, images, capsys):
    model = _weights(tmp_path / "run" / "last.ckpt")
    words = (tmp_path / "run", "--data", images / "train", "--arch", "resnet8", "--size", 16)
    found = _json(capsys, *words)
    plain = quality.image_sets(images / "train", size=16)[0]
    with torch.no_grad():
        expected = _expected([model(torch.stack([image for image, _ in plain]))])
    known = {name: value for name, value in expected.items() if value is not None}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=1e-4)
    assert found["lidar"] is None and found.keys() == expected.keys()
    scaled = _json(capsys, *words, "--mean", 0, 0, 0, "--std", 0.1, 0.2, 0.4)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    given = torch.stack([(image * std + mean) / torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1) for image, _ in plain])
    with torch.no_grad():
        assert scaled["rankme"] == pytest.approx(_expected([model(given)])["rankme"], rel=1e-4)
    with_views = _json(capsys, *words, "--views", 3)
    assert with_views["lidar"] > 1 and 0 < with_views["alignment"] < 4
    assert {name: with_views[name] for name in ("rankme", "uniformity")} == pytest.approx(
        {name: found[name] for name in ("rankme", "uniformity")}
    )
    assert with_views == _json(capsys, *words, "--views", 3), "the views are those of the seed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.npy"], "there is no file or folder missing.npy"),
        (["text.npy"], "text.npy is not a readable .npy file"),
        (["flat.npy"], "must hold floating-point numbers [N, D] or [views, N, D], got torch.float32 [3]"),
        (["whole.pt"], "must hold floating-point numbers [N, D] or [views, N, D], got torch.int64 [2, 2]"),
        (["whole.npy"], "must hold floating-point numbers [N, D] or [views, N, D], got int64 [2, 2]"),
        (["two.npz"], "two.npz must have an array with the name features, got a, b"),
        (["text.npz"], "text.npz is not a readable .npz file"),
        (["text.pt"], "text.pt cannot be read as a checkpoint"),
        (["weights.pt"], "a checkpoint needs images: --data FOLDER"),
        (["nan.npy"], "nan.npy holds numbers that are not finite"),
        (["last.ckpt"], "a checkpoint needs images: --data FOLDER"),
        (["last.ckpt", "--data", "nowhere", "--arch", "resnet8"], "there is no folder nowhere"),
        (["flat.npy", "--views", "1"], "--views must be 0 or at least 2"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("text.npy", "text.npz", "text.pt"):
        (tmp_path / name).write_text("no array")
    np.savez("two.npz", a=np.eye(2), b=np.eye(2))
    torch.save(torch.ones(2, 2, dtype=torch.int64), "whole.pt")
    np.save("whole.npy", np.ones((2, 2), dtype=np.int64))
    torch.save({"state_dict": {}}, "weights.pt")
    np.save("flat.npy", np.zeros(3))
    np.save("nan.npy", np.array([[1.0, math.nan]]))
    _weights(tmp_path / "last.ckpt")
    with pytest.raises(SystemExit) as ended:
        quality.main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_report_correlates_runs(tmp_path, images, capsys):
    results = tmp_path / "digits"
    places = {"untrained": "", "isoloss": "", "byol": "pretrain", "supervised": "linear/all"}
    for seed, (method, place) in enumerate(places.items()):
        folder = results / "solo" / method / "seed0"
        _weights(folder / place / "last.ckpt", seed)
        (folder / "result.json").write_text(json.dumps({"framework": "solo", "method": method, "knn": 50.0}))
    bad = results / "solo" / "cpc" / "seed0"
    _weights(bad / "linear" / "all" / "last.ckpt")  # a classifier on frozen features
    (bad / "result.json").write_text("{}")
    assert quality_report.main([str(results), "--data", str(images), "--views", "2"]) == 0
    assert "1/5" in capsys.readouterr().out
    runs = json.loads((results / "quality.json").read_text())
    assert len(runs["runs"]) == 4 and "contains no checkpoint" in runs["skipped"][0]
    text = (results / "quality.md").read_text()
    assert "| RankMe " in text and "| Spearman, self-supervised | solo" in text and "- solo/cpc/seed0" in text
    assert (results / "quality.png").stat().st_size > 5000


def test_correlations_of_known_runs():
    def run(knn: float, rank: float) -> dict[str, float]:
        return {"knn": knn, **dict.fromkeys(quality_report.TITLES, math.nan), "rankme": rank}

    found = quality_report.correlations([run(10, 1), run(20, 4), run(30, 2), run(40, 8), run(50, math.nan)])
    assert found.keys() == {"rankme"}
    spearman, pearson, count = found["rankme"]
    assert count == 4 and spearman == pytest.approx(0.8)
    assert pearson == pytest.approx(np.corrcoef([10, 20, 30, 40], [1, 4, 2, 8])[0, 1])
