"""The table of a suite on several data sets, from made-up results."""

import json

import pytest
from PIL import Image

from plugins.experiments import report, report_datasets
from plugins.experiments.published import PUBLISHED
from plugins.experiments.suites import Request, solo


def add_run(out, label, *, seed=0, **numbers):
    """A finished run; no numbers: an unfinished one."""
    folder = out / "solo" / label / f"seed{seed}"
    folder.mkdir(parents=True)
    if numbers:
        method, _, dataset = label.rpartition("_")
        identity = {"framework": "solo", "method": method, "dataset": dataset, "seed": seed}
        (folder / "result.json").write_text(json.dumps({**identity, **numbers}))


SCORES = {"epochs": 1000, "online": 91.5, "online_top5": 99.75, "knn": 90.0, "linear": None, "seconds": 5400}


@pytest.fixture
def results(tmp_path):
    out = tmp_path / "ssl_ey"
    add_run(out, "ssl_ey_cifar100", **{**SCORES, "online": 67.0})
    add_run(out, "ssl_ey-no-projector_cifar10", **{**SCORES, "online": 90.5})
    add_run(out, "ssl_ey_cifar10", **SCORES)
    return out


def cells(text):
    """Rows of the Markdown table: (data set, method) → the other cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(row[0], row[1]): row[2:] for row in lines}


def test_table_is_by_data_set_and_beside_published_numbers(results):
    table = cells(report_datasets.write(results))
    assert list(table)[2:] == [("cifar10", "ssl_ey"), ("cifar10", "ssl_ey-no-projector"), ("cifar100", "ssl_ey")]
    assert table["cifar10", "ssl_ey"] == ["1000", "91.5", "99.8", "90.0", "91.43", "99.75", "1.50"]
    assert table["cifar10", "ssl_ey-no-projector"][4:6] == ["90.98", "99.69"]
    assert table["cifar100", "ssl_ey"][4:6] == ["67.52", "90.17"]
    assert table["data set", "method"] == [
        *("epochs", "online (%)", "top-5 (%)", "kNN (%)", "published (%)", "top-5 (%)", "hours"),
    ]


def test_a_column_is_there_where_a_run_has_the_number(results):
    add_run(results, "ssl_ey_imagenet100", **{**SCORES, "linear": 80.0, "linear_top5": 95.0})
    table = cells(report_datasets.write(results))
    assert table["imagenet100", "ssl_ey"] == ["1000", "91.5", "99.8", "90.0", "80.0", "95.0", "", "", "1.50"]
    assert table["cifar10", "ssl_ey"][4:6] == ["–", "–"]


def test_cells_without_a_published_number_are_empty(tmp_path):
    out = tmp_path / "implicit_var_reg"
    add_run(out, "isoloss_cifar10", **SCORES)
    text = report_datasets.write(out)
    assert cells(text)["cifar10", "isoloss"][4:6] == ["", ""]
    assert "no numbers are available for these runs" in text


def test_seeds_and_missing_runs(results):
    add_run(results, "ssl_ey_cifar10", seed=1, **{**SCORES, "online": 92.5})
    add_run(results, "ssl_ey_stl10")
    text = report_datasets.write(results)
    assert cells(text)["cifar10", "ssl_ey"][1] == "92.0 ± 0.7"
    assert cells(text)["stl10", "ssl_ey: missing"][0] == "–"
    assert "Missing (not finished or failed; each folder has a log.txt): " in text
    assert "over up to 2 seeds" in text


def test_the_command_writes_table_and_figure(results, capsys):
    assert report.main([str(results), "--by-dataset"]) == 0
    assert (results / "table.md").read_text() in capsys.readouterr().out
    with Image.open(results / "figure.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert (results / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_an_empty_folder_is_a_mistake(tmp_path, capsys):
    assert report.main([str(tmp_path), "--by-dataset"]) == 2
    assert "no runs in" in capsys.readouterr().err


def test_published_numbers_are_of_runs_of_their_suite():
    for suite, runs in (("ssl_ey", solo.ssl_ey), ("implicit_var_reg", solo.implicit_var_reg)):
        assert set(PUBLISHED[suite]) <= {run.label for run in runs(Request())}
