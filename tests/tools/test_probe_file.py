"""YAML files of probes: meaning, errors, and the files in configs/probes."""

import json
from pathlib import Path

import pytest

from plugins.tools.command import UserError
from plugins.tools.probe import Probe, Setting
from plugins.tools.probe_file import read_probes

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(ROOT / "solo") for path in (ROOT / "solo").rglob("probe*.yaml"))
SHARED = {"hidden_dim": 8, "holdout": 0.2, "batch_size": 64, "lr": 0.4, "epochs": 3}
LINEAR = {"kind": "linear", "fraction": 1.0, "weight_decay": [1e-4, 1e-2]}


def _file(folder: Path, content) -> Path:
    (folder / "probe.yaml").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "probe.yaml"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_of_the_suites_are_read(file):
    probes = read_probes(ROOT / "solo" / file)
    if file.parts[0] == "tinyimagenet":
        assert {(probe.batch_size, probe.hidden_dim) for probe in probes} == {(512, 2048)}
        assert {setting[1:] for probe in probes for setting in probe.grid} == {(0.6, "sgd", False)}
        decays = [tuple(setting.weight_decay for setting in probe.grid) for probe in probes]
        linear, subsets = (1e-4, 1e-5, 1e-6), [(1.0, 100), (1.0, 100), (0.1, 100), (0.01, 100), (0.002, 1000)]
        if file.stem == "probe_subsets":
            assert [(probe.fraction, probe.epochs) for probe in probes] == subsets
            assert decays == [(1e-6,), (1e-5,), *[(1e-6,)] * 3]
        else:
            kind = "mlp" if file.stem == "probe_mlp" else "linear"
            assert [(p.kind, p.fraction, p.epochs) for p in probes] == [(kind, 1.0, 100)]
            assert decays == [linear]


def test_there_is_a_file_of_each_kind_for_each_data_set_of_the_suites():
    names = ("probe", "probe_mlp", "probe_subsets")
    assert {str(file) for file in FILES} == {f"{d}/{n}.yaml" for d in ("digits/short", "tinyimagenet") for n in names}


def test_published_grid_of_imagenet():
    (probe,) = read_probes(ROOT / "probes" / "dissl_linear.yaml")
    assert (probe.kind, probe.fraction, probe.epochs, probe.batch_size, probe.holdout) == ("linear", 1, 100, 2048, 0.1)
    sgd = [(1e-5, 0.1), (1e-6, 0.1), (3e-6, 0.1), (1e-6, 0.3), (1e-6, 0.03), (1e-6, 0.01), (1e-6, 0.003)]
    adamw = [
        *((1e-2, 1e-3), (1e-2, 3e-3), (1e-2, 3e-4), (1e-2, 1e-4)),
        *((1e-1, 3e-4), (3e-2, 3e-4), (3e-3, 3e-4), (1e-3, 3e-4), (1e-4, 3e-4)),
    ]
    wanted = [
        *((decay, rate, "sgd", False) for decay, rate in sgd),
        (1e-6, 0.1, "sgd", True),
        *((decay, 0.01, "lars", False) for decay in (0, 1e-6)),
        *((decay, rate, "adamw", False) for decay, rate in adamw),
    ]
    assert [tuple(setting) for setting in probe.grid] == [(d, pytest.approx(8 * r), *rest) for d, r, *rest in wanted]


def test_published_transfer_by_name():
    logistic, svc = read_probes(Path("dissl_transfer"))
    assert (logistic.kind, logistic.search, logistic.C) == ("logistic", 10, ())
    assert (svc.kind, svc.search, svc.grid) == ("svc", 10, ())


def test_learning_rates_come_before_weight_decays_in_the_order_of_the_file(tmp_path):
    grid = {**LINEAR, "lr": [3, 1], "optimizer": "adamw", "normalized": True}
    (probe,) = read_probes(_file(tmp_path, {"batch_size": 128, "probes": [grid]}))
    wanted = [(1e-4, 1.5), (1e-2, 1.5), (1e-4, 0.5), (1e-2, 0.5)]
    assert [(setting.weight_decay, setting.lr) for setting in probe.grid] == wanted
    assert {setting[2:] for setting in probe.grid} == {("adamw", True)}


def test_what_is_left_out_has_the_defaults(tmp_path):
    content = {"probes": [{"kind": "linear", "weight_decay": 0.1}, {"kind": "svc", "C": 2}]}
    assert read_probes(_file(tmp_path, content)) == [Probe("linear", (Setting(0.1, 0.6),)), Probe("svc", C=(2,))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not a valid YAML file"),
        ("- 1", "must have the entries probes, and may have hidden_dim, .*, epochs, got"),
        ({**SHARED}, "must have the entries probes, and may have .*, got hidden_dim"),
        ({**SHARED, "probes": []}, "probes must contain at least one probe"),
        ({**SHARED, "epochs": 1.5, "probes": [LINEAR]}, "epochs must be an integer, got 1.5"),
        ({**SHARED, "probes": [3]}, r"probes\[0\] must have the entries kind, weight_decay, and may have .*, got 3"),
        ({**SHARED, "probes": [LINEAR, {**LINEAR, "wd": 1}]}, r"probes\[1\] must have the entries .*, wd"),
        (
            {**SHARED, "probes": [{**LINEAR, "kind": "knn"}]},
            r"kind must be one of linear, mlp, amdim_linear, amdim_mlp, logistic, svc, got 'knn'",
        ),
        ({**SHARED, "probes": [{**LINEAR, "kind": ["mlp"]}]}, "kind must be a string, got"),
        ({**SHARED, "probes": [{**LINEAR, "weight_decay": ["x"]}]}, "weight_decay must be a number or a list of numb"),
        ({**SHARED, "probes": [{**LINEAR, "weight_decay": []}]}, "weight_decay must be a number or a list of numbers"),
        ({**SHARED, "probes": [{**LINEAR, "normalized": 1}]}, "normalized must be true or false, got 1"),
        ({**SHARED, "probes": [{**LINEAR, "optimizer": "adam"}]}, "optimizer must be one of sgd, lars, adamw"),
        ({**SHARED, "probes": [{**LINEAR, "fraction": 2}]}, "fraction must be above 0 and at most 1, got 2"),
        ({**SHARED, "probes": [{**LINEAR, "grid": []}]}, "must have the entries kind, grid, and may have fraction, ep"),
        ({"probes": [{"kind": "mlp", "grid": []}]}, "a mlp probe needs a grid of settings"),
        ({"probes": [{"kind": "mlp", "grid": [{"lr": 1}]}]}, r"probes\[0\].grid\[0\] must have the entries weight_dec"),
        ({"probes": [{"kind": "svc"}]}, "a svc probe needs either C or search"),
        ({"probes": [{"kind": "svc", "C": -1}]}, "C must be above 0, got -1"),
        ({"probes": [{"kind": "logistic", "search": 1, "lr": 1}]}, "must have the entries kind, and may have fraction"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_probes(_file(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config must be a YAML file .*, got .*none\.yaml"):
        read_probes(tmp_path / "none.yaml")
