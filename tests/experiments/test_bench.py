"""The benchmark compares equal things, and the marks hold."""

import json
import math

import pytest
import torch

from plugins.experiments.bench import LOSSES, PREDICTORS, compare, main
from plugins.methods import METHODS


@pytest.fixture
def one_thread():
    """Threads that wait for each other are slow where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [*LOSSES, *PREDICTORS])
def test_compares_equal_things(name):
    result = compare(name, 64, 16, repeat=1)
    assert result.difference < 1e-4
    assert result.plain_bytes > 0 and result.ours_bytes > 0
    assert result.time_ratio > 0


def test_memory_is_that_alive_at_once():
    # an N x D float32 of 64 x 16 is 4096 bytes: the gradient, which is made from two more
    result = compare("byol", 64, 16, repeat=1)
    assert 4096 <= result.ours_bytes <= 5 * 4096


def test_command_prints_and_writes(tmp_path, capsys):
    assert main(["losses", "--sizes", "32x8", "8x32", "--repeat", "1", "--json", str(tmp_path / "new" / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(LOSSES)
    written = json.loads((tmp_path / "new" / "b.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert [(r["case"], r["rows"]) for r in written["results"]] == [(n, rows) for rows in (32, 8) for n in LOSSES]
    floors = [r["flop_ratio"] for r in written["results"] if r["case"] == "ssl_ey"]
    products = (6 * 32 * 8**2 * 3 + 6 * 8**3) / (8 * 32 * 8**2), (6 * 8 * 32**2 * 3 + 6 * 32**3) / (16 * 8**2 * 32)
    assert floors == pytest.approx(products)


def test_command_leaves_out_what_does_not_fit(capsys):
    assert main(["losses", "--sizes", "32x8", "8192x8192", "--repeat", "1", "--budget", "60"]) == 0
    assert capsys.readouterr().out.count("left out") == len(LOSSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["losses", "--sizes", "256"], "must be ROWSxWIDTH"),
        (["losses", "--sizes", "1x8"], "at least 2 rows"),
        (["predictors", "--repeat", "0"], "--repeat: must be a whole number, at least 1, got 0"),
        (["step", "--batch", "1"], "--batch: must be a whole number, at least 2, got 1"),
        (["step", "--method", "isolos"], "no method matches 'isolos'; there are byol, cissl, directcopy"),
        (["step", "--method", "isoloss", "--backbone", "resnet1"], "there is no backbone 'resnet1'"),
        (["step", "--method", "isoloss", "optimizer"], "optimizer"),
        (["step", "--configs", "nowhere"], "--config-path is no folder: nowhere"),
        (["everything"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_command_explains_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


_TINY = ("--batch", "4", "--size", "16", "--hidden", "8", "--width", "4", "--repeat", "2", "--steps", "1")


@pytest.mark.parametrize("name", ["matrix_ssl", "mec"])
@pytest.mark.parametrize(("rows", "width"), [(64, 16), (16, 64), (96, 128), (128, 96), (256, 32), (32, 256)])
def test_matrix_losses_take_less_memory_at_any_size(name, rows, width):
    result = compare(name, rows, width, repeat=1)
    assert result.ours_bytes < result.plain_bytes


@pytest.mark.slow
@pytest.mark.solo
def test_step_compares_each_method_with_one_of_solo_learns(one_thread, tmp_path, capsys):
    assert (
        main(["step", "--method", "[!di]*", *_TINY, "--json", str(tmp_path / "step.json"), "optimizer.name=sgd"]) == 0
    )
    header, titles, rule, *rows, left_out = (line for line in capsys.readouterr().out.splitlines() if line)
    assert left_out.endswith("such a projector: cissl")
    assert "4 images of 16 px" in header and "CPU threads" in header
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (titles, rule, *rows)]
    assert {len(row) for row in cells} == {9}
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["environment"]["batch"] == 4 and written["environment"]["overrides"] == ["optimizer.name=sgd"]
    results = written["results"]
    expected = []
    pairs = {"byol": "byol", "matrix_ssl": "byol", "mec": "byol", "simsiam": "simsiam", "ssl_ey": "vicreg"}
    for name, reference in pairs.items():
        spec = METHODS[name]
        expected += [(name, teacher, reference) for teacher in (("EMA", "τ = 0") if spec.teacher else ("none",))]
    assert [(r["method"], r["teacher"], r["reference"]) for r in results] == expected
    assert [tuple(row[:3]) for row in cells[2:]] == expected
    for r in results:
        assert (r["hidden"], r["width"], len(r["ratios"])) == (8, 4, 2)
        assert min(r[key] for key in ("seconds", "reference_seconds", "ratio", "fastest")) > 0
    assert len({r["reference_seconds"] for r in results if r["reference"] == "byol"}) == 1


@pytest.mark.slow
@pytest.mark.solo
@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), *(pytest.param("cuda", each, marks=pytest.mark.gpu) for each in ("32", "16", "bf16"))],
)
def test_step_in_each_precision(device, precision, one_thread, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("NOT TESTED on a GPU: there is none")
    options = ("--method", "isoloss", "--device", device, "--precision", precision, "--json", str(tmp_path / "b.json"))
    assert main(["step", *options, *_TINY]) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert (written["environment"]["precision"], len(written["results"])) == (precision, 2)
    assert all(result["ratio"] > 0 for result in written["results"])


@pytest.mark.slow
@pytest.mark.solo
@pytest.mark.parametrize(("method", "limits"), [("isoloss", (1.25, 0.95)), ("ssl_ey", (1.25,))])
def test_step_marks(method, limits, one_thread, tmp_path):
    # a quiet machine must reach 1, clearly less at τ = 0, and 1; on a shared one the best of three looks counts
    sizes = ("--batch", "64", "--size", "16", "--repeat", "4", "--steps", "1", "--clock", "processor")
    best = dict.fromkeys(range(len(limits)), math.inf)
    for _ in range(3):
        assert main(["step", "--method", method, *sizes, "--json", str(tmp_path / "b.json")]) == 0
        results = json.loads((tmp_path / "b.json").read_text())["results"]
        assert len(results) == len(limits)
        best = {i: min(best[i], result["ratio"], result["fastest"]) for i, result in enumerate(results)}
        if all(best[i] < limit for i, limit in enumerate(limits)):
            return
    pytest.fail(f"{best} where {limits} are the limits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "width", "mark"),
    # a third below what a quiet machine must reach (3, 25, 1, 1 and 3): shared machines are noisy
    [
        ("ssl_ey", 256, 512, 2),
        ("ssl_ey", 256, 2048, 16),
        ("ssl_ey", 256, 128, 0.67),
        ("ssl_ey", 1024, 512, 0.67),
        ("closed_form_predictor", 256, 256, 2),
    ],
)
def test_marks(name, rows, width, mark, one_thread):
    best = max(compare(name, rows, width, repeat=5, budget=20).time_ratio for _ in range(2))
    assert best >= mark


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "width", "mark"),
    # below what a quiet machine must reach (1, 3, 1 and 1): large logits wait for memory, which all processes share
    [
        ("dissl_2", 64, 16384, 0.67),
        ("dissl_8", 64, 16384, 1.2),
        ("cissl_2", 256, 128, 0.67),
        ("cissl_8", 128, 128, 0.67),
    ],
)
def test_marks_of_many_views(name, rows, width, mark, one_thread):
    # one of three looks is enough where machines are noisy
    assert any(compare(name, rows, width, repeat=5, budget=20).time_ratio >= mark for _ in range(3))
    result = compare(name, rows, width, repeat=1)
    assert result.ours_bytes < result.plain_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "width", "mark"),
    [
        ("matrix_ssl", 256, 512, 5),
        ("matrix_ssl", 256, 1024, 30),
        ("matrix_ssl", 1024, 256, 1.6),
        ("mec", 256, 64, 1.6),
        ("mec", 512, 256, 1.6),
    ],
)
def test_marks_of_matrix_losses(name, rows, width, mark, one_thread):
    # operations save more than the mark asks for, so that one of three looks is enough where machines are noisy
    assert any(compare(name, rows, width, repeat=2, budget=10).time_ratio >= mark for _ in range(3))
