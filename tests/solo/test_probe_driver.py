"""main_probe: accuracies and errors."""

import json
from pathlib import Path

import pytest

from plugins.tools.command import UserError
from plugins.tools.probe import Probe, Setting, evaluate_probe
from solo_ext import features, main_probe

pytestmark = pytest.mark.solo
ROOT = Path(__file__).parents[2] / "configs" / "solo"

SHARED = {"hidden_dim": 8, "holdout": 0.2, "batch_size": 64, "lr": 0.4, "epochs": 3}
LINEAR = {"kind": "linear", "fraction": 1.0, "weight_decay": [1e-4, 1e-2]}


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    """The folder of a run of SimCLR, not trained."""
    from hydra import compose, initialize_config_dir

    from solo_ext.main_pretrain import pretrain

    overrides = [
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", "max_epochs=0"),
        *(f"checkpoint.dir={tmp_path_factory.mktemp('runs')}", "++checkpoint.version=v", "++backbone.kwargs.dim=64"),
    ]
    with initialize_config_dir(str(ROOT / "digits" / "short"), version_base="1.2"):
        return pretrain(compose("simclr", overrides))


def _file(folder: Path, content) -> Path:
    (folder / "probe.yaml").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "probe.yaml"


def _arguments(run: Path, digits: Path, file: Path, *more: str):
    options = [
        *("--pretrained_checkpoint_dir", str(run), "--dataset", "digits", "--num_workers", "0", "--device", "cpu"),
        *("--train_data_path", str(digits / "train"), "--val_data_path", str(digits / "val")),
        *("--config", str(file), *more),
    ]
    return main_probe.parser().parse_args(options)


@pytest.mark.slow
@pytest.mark.sample("test")
@pytest.mark.parametrize("select", ["validation", "test"])
def test_probes_are_those_of_the_file_on_the_features_of_the_run(run, digits, tmp_path, capsys, select):
    mlp = {"kind": "mlp", "fraction": 0.5, "weight_decay": [1e-3], "epochs": 2}
    file = _file(tmp_path, {**SHARED, "probes": [LINEAR, {"kind": "logistic", "C": [1, 2]}, mlp]})
    args = _arguments(run, digits, file, "--select", select, "--seed", "3", "--output", str(tmp_path / "probe.json"))
    found = main_probe.evaluate(args)

    known = features.read_run(run)
    device = features.usable_device("cpu")
    extract = features.extractor(known, device, projector=False)
    images = features.open_images(args, known, need_labels=True)
    sides = []
    for split in ("train", "val"):
        rows = features.collect(images[split], extract, device, batch_size=50, workers=0, title=split)
        sides.append((rows["backbone"], rows["labels"]))
    assert sides[0][0].shape == (96, 64)
    shared = {"hidden_dim": 8, "holdout": 0.2, "batch_size": 64}
    wanted = [
        Probe("linear", (Setting(1e-4, 0.1), Setting(1e-2, 0.1)), **shared, epochs=3),
        Probe("logistic", C=(1, 2), **shared, epochs=3),
        Probe("mlp", (Setting(1e-3, 0.1),), fraction=0.5, **shared, epochs=2),
    ]
    assert found == [evaluate_probe(*sides, probe, select=select, seed=3) for probe in wanted]
    assert json.loads((tmp_path / "probe.json").read_text()) == found
    lines = capsys.readouterr().out.splitlines()
    assert f"chosen on the {select} images" in lines[-2]
    assert lines[-1].startswith("mlp probe, 48 labels: acc@1 ") and "chosen" not in lines[-1]


def test_too_few_labels_are_one_sentence(run, digits, tmp_path):
    few = {**LINEAR, "fraction": 0.11}
    with pytest.raises(UserError, match="cannot split 11 labels into 9 and 2 with each of the 10 classes"):
        main_probe.evaluate(_arguments(run, digits, _file(tmp_path, {**SHARED, "probes": [few]})))


def test_a_wrong_file_is_refused_before_anything_is_read(tmp_path):
    args = _arguments(tmp_path / "no run", tmp_path, _file(tmp_path, {**SHARED, "probes": []}))
    with pytest.raises(UserError, match="probes must contain at least one probe"):
        main_probe.evaluate(args)


def test_missing_paths_are_refused(run, digits, tmp_path):
    with pytest.raises(UserError, match="--config must be a YAML file"):
        main_probe.evaluate(_arguments(run, digits, tmp_path / "none.yaml"))
    file = _file(tmp_path, {**SHARED, "probes": [LINEAR]})
    with pytest.raises(UserError, match="is not the folder of a run"):
        main_probe.evaluate(_arguments(tmp_path, digits, file))
    with pytest.raises(UserError, match="--train_data_path is not a folder"):
        main_probe.evaluate(_arguments(run, tmp_path, file))
