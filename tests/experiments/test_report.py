"""Table and figure from made-up results: what is shown, what is missing, what does not crash."""

import json

import pytest
from PIL import Image

from plugins.experiments import report


def add_run(out, method, *, seed=0, framework="solo", curves=True, **numbers):
    """A finished run; no numbers: an unfinished one."""
    folder = out / framework / method / f"seed{seed}"
    folder.mkdir(parents=True)
    if numbers:
        identity = {"framework": framework, "method": method, "dataset": "digits", "seed": seed}
        (folder / "result.json").write_text(json.dumps({**identity, **numbers}))
    if curves:
        # Lightning leaves a cell empty where a number was not logged together with the others.
        rows = [f"{epoch},{epoch * 20},{1 / (epoch + 1)},\n{epoch},{epoch * 20},,50" for epoch in range(4)]
        (folder / "metrics.csv").write_text("epoch,step,train_ssl_loss_epoch,val_acc1\n" + "\n".join(rows) + "\n")
        spectrum = [f"{epoch},2.0,{0.1 * (epoch + 1)},1e-12,0.0" for epoch in range(4)]
        head = "epoch,eigval_1,eigval_2,eigval_3,eigval_4\n"
        (folder / "eigenvalues.csv").write_text(head + "\n".join(spectrum) + "\n")
    return folder


SCORES = {"epochs": 25, "knn": 90.0, "linear": 94.0, "linear_5": 80.0, "seconds": 100.0, "images_per_second": 320.0}


@pytest.fixture
def results(tmp_path):
    add_run(tmp_path, "untrained", curves=False, epochs=0, knn=64.0, linear=74.0, linear_5=36.5)
    add_run(tmp_path, "supervised", curves=False, **{**SCORES, "knn": 97.0})
    add_run(tmp_path, "ssl_ey", **SCORES)
    add_run(tmp_path, "byol", **{**SCORES, "knn": 80.25})
    return tmp_path


def cells(table):
    """Rows of the Markdown table, name first."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_table_holds_accuracy_and_points_above_untrained(results):
    table = cells(report.make_table(report.read_rows(results)))
    assert table["SSL-EY"] == ["25", "90.0 (+26.0)", "94.0 (+20.0)", "80.0 (+43.5)", "100", "320"]
    assert table["*untrained* (baseline)"] == ["0", "64.0", "74.0", "36.5", "–", "–"]


def test_baselines_stand_at_the_ends(results):
    names = list(cells(report.make_table(report.read_rows(results))))[2:]
    assert names == ["*untrained* (baseline)", "BYOL", "SSL-EY", "*supervised* (baseline)"]


def test_seeds_give_mean_and_deviation(results):
    add_run(results, "ssl_ey", seed=1, **{**SCORES, "knn": 92.0})
    text = report.make_table(report.read_rows(results))
    assert cells(text)["SSL-EY"][1] == "91.0 ± 1.4 (+27.0)"
    assert "over up to 2 seeds" in text


@pytest.mark.slow
def test_unfinished_and_broken_runs_are_shown_as_missing(results, capsys):
    add_run(results, "isoloss")
    broken = add_run(results, "simsiam", curves=False, **SCORES)
    (broken / "result.json").write_text('{"knn": 9')
    add_run(results, "directpred", curves=False, epochs=25, knn=float("nan"), linear=None)
    assert report.main([str(results)]) == 0
    text = capsys.readouterr().out
    table = cells(text)
    assert table["IsoLoss: missing"] == ["–"] * 6
    assert table["SimSiam: missing"] == ["–"] * 6
    assert table["DirectPred"] == ["25", "–", "–", "–", "–", "–"]
    assert str(results / "solo" / "isoloss" / "seed0") in text


def test_frameworks_are_named_and_compared_with_their_own_untrained(results):
    add_run(results, "untrained", framework="lightly", epochs=0, knn=60.0, linear=70.0, linear_5=30.0)
    add_run(results, "byol", framework="lightly", **SCORES)
    table = cells(report.make_table(report.read_rows(results)))
    assert table["BYOL (lightly)"][1] == "90.0 (+30.0)"
    assert table["BYOL (solo)"][1] == "80.2 (+16.2)"


@pytest.mark.slow
def test_command_writes_table_and_figures(results, capsys):
    assert report.main([str(results)]) == 0
    assert (results / "table.md").read_text() in capsys.readouterr().out
    width, height = Image.open(results / "figure.png").size
    assert width > 800
    assert height > 600
    assert (results / "figure.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_figure_is_the_same_each_time(results):
    report.main([str(results)])
    first = [(results / name).read_bytes() for name in ("figure.png", "figure.pdf")]
    report.main([str(results)])
    assert first == [(results / name).read_bytes() for name in ("figure.png", "figure.pdf")]


@pytest.mark.slow
def test_a_lone_unfinished_run_does_not_crash(tmp_path):
    add_run(tmp_path, "byol", curves=False)
    assert report.main([str(tmp_path)]) == 0


@pytest.mark.slow
def test_baselines_alone_do_not_crash(tmp_path):
    add_run(tmp_path, "untrained", curves=False, epochs=0, knn=64.0, linear=74.0, linear_5=36.5)
    assert report.main([str(tmp_path)]) == 0


@pytest.mark.slow
def test_many_rows_wrap(tmp_path):
    for number in range(9):
        add_run(tmp_path, f"method_{number}", **SCORES)
    assert report.main([str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_no_runs_is_an_error_in_one_sentence(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_seeds_are_in_numeric_order(tmp_path):
    for seed in (10, 2, 0):
        add_run(tmp_path, "byol", seed=seed, **SCORES)
    (row,) = report.read_rows(tmp_path)
    assert [folder.name for folder in row.folders] == ["seed0", "seed2", "seed10"]


def test_curves_skip_lines_without_the_number(tmp_path):
    folder = add_run(tmp_path, "byol", **SCORES)
    assert report.read_losses(folder) == ([1.0, 2.0, 3.0, 4.0], [1.0, 1 / 2, 1 / 3, 1 / 4])
    epochs, spectra = report.read_spectrum(folder)
    assert epochs == [1.0, 2.0, 3.0, 4.0]
    assert spectra[1] == [2.0, 0.2, 1e-12, 0.0]
    (folder / "metrics.csv").write_text("epoch,train_ssl_loss_epoch\n0,nan\n1,\n2,oops\n")
    assert report.read_losses(folder) == ([], [])


@pytest.mark.slow
def test_a_half_written_line_of_eigenvalues_does_not_crash(tmp_path):
    folder = add_run(tmp_path, "byol", **SCORES)
    with (folder / "eigenvalues.csv").open("a") as file:
        file.write("4,2.0,0.")
    assert report.main([str(tmp_path)]) == 0
