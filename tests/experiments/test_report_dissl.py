"""Tables and figures of DISSL's suites, from made-up results."""

import csv
import json
import math

import pytest
from PIL import Image

from plugins.experiments import report_dissl
from plugins.experiments.published import PUBLISHED
from plugins.experiments.report_dissl import curves, ordered, scores, standard_error
from plugins.experiments.suites import dissl
from plugins.tools.command import UserError


def probe(
    acc1, *, kind="linear", dim=512, fraction=1.0, labels=1000, weight_decay=1e-5, grid=None, select="validation"
):
    entries = [{"weight_decay": value, "acc1": a} for value, a in (grid or {weight_decay: acc1}).items()]
    numbers = {"kind": kind, "dim": dim, "fraction": fraction, "labels": labels, "select": select, "acc5": 90.0}
    return {**numbers, "acc1": acc1, "weight_decay": weight_decay, "grid": entries}


def add_run(out, label, seed, *probes):
    """A finished run; no probes: an unfinished one."""
    folder = out / "solo" / label / f"seed{seed}"
    folder.mkdir(parents=True)
    if probes:
        method, _, dataset = label.rpartition("_")
        identity = {"framework": "solo", "method": method, "dataset": dataset, "seed": seed, "epochs": 300}
        (folder / "result.json").write_text(json.dumps({**identity, "seconds": 7200, "probes": list(probes)}))


@pytest.fixture
def table1(tmp_path):
    out = tmp_path / "dissl_table1_contrastive"
    grids = ({1e-4: 40.0, 1e-5: 43.0}, {1e-4: 47.0, 1e-5: 42.0}, {1e-4: 45.0, 1e-5: 44.0})
    for seed, (grid, chosen) in enumerate(zip(grids, (1e-5, 1e-4, 1e-5), strict=True)):
        add_run(out, "cissl_tinyimagenet", seed, probe(grid[chosen], grid=grid, weight_decay=chosen))
    add_run(out, "simclr_tinyimagenet", 0, probe(41.25))
    add_run(out, "cissl-dim_tinyimagenet", 0)
    add_run(out, "cissl_digits", 0, probe(91.0, labels=1297))
    return out


def cells(text):
    """Rows of the Markdown table: (data set, run) → the other cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(row[0], row[1]): row[2:] for row in lines[2:]}


def test_standard_error_of_the_mean():
    assert standard_error([43.0, 47.0, 44.0]) == pytest.approx(math.sqrt(13 / 3) / math.sqrt(3))
    assert standard_error([1.0]) is None


def test_mean_over_seeds_and_the_best_of_the_means(table1):
    (row,) = [row for row, _ in ordered(table1, "dissl_table1_contrastive") if row.method == "cissl_tinyimagenet"]
    (score,) = scores(row, "CISSL")
    assert score.mean == pytest.approx((43 + 47 + 44) / 3)
    assert score.sem == pytest.approx(1.2019, abs=1e-4)
    assert score.best_on_test == pytest.approx(max((40 + 47 + 45) / 3, (43 + 42 + 44) / 3))
    assert (score.seeds, score.weight_decay) == (3, (1e-5, 1e-4))


def test_seeds_that_were_probed_in_different_ways_are_not_averaged(table1):
    add_run(table1, "simclr_tinyimagenet", 1, probe(41.0, select="test"))
    with pytest.raises(UserError, match="the seeds of simclr_tinyimagenet have different probes; delete"):
        report_dissl.write(table1)


def test_table_is_in_the_papers_order_beside_its_numbers(table1):
    files = report_dissl.write(table1)
    assert [file.name for file in files] == ["table.md", "summary.csv"]
    text = files[0].read_text()
    table = cells(text)
    assert list(table) == [
        ("tinyimagenet", "simclr"),
        ("tinyimagenet", "cissl"),
        ("tinyimagenet", "cissl-dim"),
        ("digits", "cissl"),
    ]
    cissl = ["CISSL", "300", "512", "linear 1e-05/1e-04", "1000", "44.7 ± 1.2", "44.0", "45.8", "2.00"]
    assert table["tinyimagenet", "cissl"] == cissl
    assert table["tinyimagenet", "simclr"][-4:] == ["41.2", "41.2", "45.2", "2.00"]
    assert table["tinyimagenet", "cissl-dim"][-4:] == ["–", "–", "47.6", "–"]
    assert table["digits", "cissl"][-2] == ""
    assert "Mean ± standard error over up to 3 seeds." in text
    assert report_dissl.DIFFERENCES in text
    assert "Missing" in text and "cissl-dim_tinyimagenet/seed0" in text


def test_summary_has_a_line_for_each_probe(table1):
    with report_dissl.write(table1)[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["simclr", "cissl", "cissl"]
    assert (float(lines[1]["mean"]), lines[1]["weight_decay"]) == (pytest.approx(44.6667, abs=1e-4), "1e-05/0.0001")
    assert lines[0]["sem"] == ""


@pytest.mark.parametrize("suite", ["dissl_table1_contrastive", "dissl_table1_distillation"])
def test_every_line_of_the_published_tables_is_a_run(suite):
    runs = [f"{variant.name}_tinyimagenet" for variant in dissl.VARIANTS[suite](dissl.SWEEPS["tinyimagenet"])]
    assert list(PUBLISHED[suite]) == runs


@pytest.fixture
def fig7a(tmp_path):
    out = tmp_path / "dissl_fig7a"
    one = {"weight_decay": 1e-6, "select": None}
    for name, start in (("quarter", 30.0), ("one", 40.0)):
        for seed in (0, 1):
            full = probe(start + 9 + seed, labels=100_000, **one)
            other = probe(99.0, labels=100_000, weight_decay=1e-5, select=None)
            few = probe(start, labels=200, fraction=0.002, **one)
            add_run(out, f"dissl-{name}_tinyimagenet", seed, full, other, few)
    return out


def test_figure_7a_is_accuracy_by_labels_for_each_strength(fig7a):
    found = [score for row, title in ordered(fig7a, "dissl_fig7a") for score in scores(row, title)]
    assert curves("dissl_fig7a", found, "validation") == {
        "tinyimagenet": [
            ("strength 0.25", [(200, 30.0, 0.0), (100_000, 39.5, pytest.approx(0.5))]),
            ("strength 1", [(200, 40.0, 0.0), (100_000, 49.5, pytest.approx(0.5))]),
        ]
    }


def test_figure_7c_is_accuracy_by_width_for_each_kind_of_probe(tmp_path):
    out = tmp_path / "dissl_fig7c"
    for heads, kind, start in (("cissl", "linear", 40.0), ("cissl_mlp", "mlp", 50.0)):
        for place, dim in enumerate((512, 128)):
            grid = {1e-4: start - place, 1e-5: start + place}
            add_run(out, f"{heads}-z{dim}_digits", 0, probe(start - place, kind=kind, dim=dim, grid=grid))
    found = [score for row, title in ordered(out, "dissl_fig7c") for score in scores(row, title)]
    by_validation, by_test = (curves("dissl_fig7c", found, select)["digits"] for select in ("validation", "test"))
    assert by_validation == [("Linear", [(128, 39.0, 0), (512, 40.0, 0)]), ("MLP", [(128, 49.0, 0), (512, 50.0, 0)])]
    assert by_test == [("Linear", [(128, 41.0, 0), (512, 40.0, 0)]), ("MLP", [(128, 51.0, 0), (512, 50.0, 0)])]


def test_figure_is_drawn_as_pdf_and_png(fig7a, capsys):
    assert report_dissl.main([str(fig7a)]) == 0
    assert "fig7a.pdf" in capsys.readouterr().out
    assert (fig7a / "fig7a.pdf").read_bytes().startswith(b"%PDF")
    image = Image.open(fig7a / "fig7a.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(image.width * image.height)}
    assert {(0x1F, 0x6F, 0xB4), (0xC8, 0x55, 0x3D)} <= colours, "a curve is missing"


@pytest.mark.parametrize(
    ("name", "message"),
    [("digits", "name of one of the suites dissl_table1_contrastive,"), ("dissl_fig7c", "no runs in")],
)
def test_folders_of_something_else_are_one_sentence(tmp_path, capsys, name, message):
    with pytest.raises(SystemExit, match="2"):
        report_dissl.main([str(tmp_path / name)])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
