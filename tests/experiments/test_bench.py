"""The benchmark compares equal results, and our losses take less work than the formulas."""

import json
import time
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from plugins.experiments import bench_step
from plugins.experiments.bench import CASES, LOSSES, PREDICTORS, compare, main
from plugins.methods import METHODS
from plugins.testing import OF_FEATURES


@pytest.fixture
def one_thread():
    """Use one thread: threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [*LOSSES, *PREDICTORS])
def test_compares_equal_things(name):
    size = (256, 8) if name.startswith("balanced_labels") else (64, 16)  # 64 rows take 6,421 iterations
    result = compare(name, *size, repeat=1)
    assert result.difference < 1e-4
    assert result.plain_bytes > 0 and result.ours_bytes > 0
    assert result.time_ratio > 0


def test_memory_is_that_alive_at_once():
    # an N x D float32 of 64 x 16 is 4096 bytes: the gradient, which is made from two more
    result = compare("byol", 64, 16, repeat=1)
    assert 4096 <= result.ours_bytes <= 5 * 4096


def test_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "new" / "b.json"
    cases = ["ssl_ey", "byol", "matrix*"]
    assert main(["losses", "--case", *cases, "--sizes", "32x8", "8x32", "--repeat", "1", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [name for name in LOSSES if name in ("ssl_ey", "byol") or name.startswith("matrix")]
    assert len(lines) == 2 + 2 * len(names)
    written = json.loads(file.read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert [(r["case"], r["rows"]) for r in written["results"]] == [(n, rows) for rows in (32, 8) for n in names]
    floors = [r["flop_ratio"] for r in written["results"] if r["case"] == "ssl_ey"]
    products = (6 * 32 * 8**2 * 3 + 6 * 8**3) / (8 * 32 * 8**2), (6 * 8 * 32**2 * 3 + 6 * 32**3) / (16 * 8**2 * 32)
    assert floors == pytest.approx(products)


def test_command_leaves_out_what_does_not_fit(capsys):
    cases = ["byol", "mec"]
    assert main(["losses", "--case", *cases, "--sizes", "32x8", "8192x8192", "--repeat", "1", "--budget", "1"]) == 0
    assert capsys.readouterr().out.count("skipped") == len(cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["losses", "--sizes", "256"], "must be ROWSxWIDTH"),
        (["losses", "--sizes", "1x8"], "at least 2 rows"),
        (["losses", "--case", "ssl_ey", "bool"], "--case: no case of losses matches 'bool'; the cases are ssl_ey, "),
        (["predictors", "--repeat", "0"], "--repeat: must be an integer, at least 1, got '0'"),
        (["step", "--batch", "1"], "--batch: must be an integer, at least 2, got '1'"),
        (
            ["step", "--method", "isolos"],
            "no method matches 'isolos'; the methods are amdim, barlow_twins, byol, cissl",
        ),
        (["step", "--method", "isoloss", "--backbone", "resnet1"], "unknown backbone 'resnet1'"),
        (["step", "--method", "isoloss", "optimizer"], "optimizer"),
        (["step", "--configs", "nowhere"], "--config-path is not a folder: nowhere"),
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
def test_relic_takes_a_third_of_the_memory():
    result = compare("relic", 4096, 16, repeat=1, budget=0)
    assert 3 * result.ours_bytes < result.plain_bytes


@pytest.mark.slow
def test_amdim_takes_a_third_of_the_memory():
    result = compare("amdim", 480, 16, repeat=1, budget=0)
    assert 3 * result.ours_bytes < result.plain_bytes


@pytest.mark.slow
@pytest.mark.solo
def test_step_compares_each_method_with_one_of_solo_learns(one_thread, tmp_path, capsys):
    assert main(["step", "--method", "[!i]*", *_TINY, "--json", str(tmp_path / "step.json"), "optimizer.name=sgd"]) == 0
    header, titles, rule, *rows, left_out = (line for line in capsys.readouterr().out.splitlines() if line)
    assert left_out.endswith(
        "solo-learn's projector): amdim, cissl, cpc, deepcluster, deepcluster_v2, dissl, pirl, sela"
    )
    assert "4 images of 16 px" in header and "CPU threads" in header
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (titles, rule, *rows)]
    assert {len(row) for row in cells} == {9}
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["environment"]["batch"] == 4 and written["environment"]["overrides"] == ["optimizer.name=sgd"]
    results = written["results"]
    expected = []
    native = {name: name for name in ("barlow_twins", "byol", "dino", "simclr", "simsiam", "swav", "vicreg")}
    native["moco"] = "mocov2plus"
    compared = [name for name in OF_FEATURES if name[0] != "i" and name not in ("cissl", "dissl")]
    for name in compared:
        spec = METHODS[name]
        reference = native.get(name) or ("byol" if spec.teacher else "vicreg")
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


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, and the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, returned))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return returned


def counted(function, inputs):
    """Operations in matrix products, bytes of traffic, and calls of a function; the same on every machine."""
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        function(*inputs)
    return flops.get_total_flops(), traffic.bytes, traffic.calls


@pytest.mark.slow
@pytest.mark.solo
@pytest.mark.parametrize(
    ("method", "limits"),
    [
        ("isoloss", (1.02, 0.8)),
        ("ssl_ey", (1.02,)),
        ("barlow_twins", (1.02,)),
        ("vicreg", (1.02,)),
        ("dino", (1.02, 0.8)),
        ("moco", (0.8, 0.6)),
        ("s[iw]*", (1.02, 1.1, 0.85, 1.02, 1.02)),  # SimDINO, with and without teacher, is compared with BYOL
    ],
)
def test_step_takes_no_more_work_than_the_reference(method, limits, one_thread, tmp_path, monkeypatch):
    """Compare IsoLoss with BYOL, with a teacher and without (τ = 0), SSL-EY with VICReg, and others with solo-learn's.

    The work is the operations in matrix products and convolutions, plus ten for each byte that an operator reads or
    writes.
    """
    sizes = ("--batch", "16", "--size", "16", "--repeat", "1", "--steps", "1")
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        monkeypatch.setitem(bench_step.CLOCKS, "work", lambda: flops.get_total_flops() + 10 * traffic.bytes)
        options = ("--method", method, *sizes, "--clock", "work", "--json", str(tmp_path / "b.json"))
        assert main(["step", *options]) == 0
    ratios = [result["ratio"] for result in json.loads((tmp_path / "b.json").read_text())["results"]]
    assert len(ratios) == len(limits)
    assert all(ratio < limit for ratio, limit in zip(ratios, limits, strict=True)), ratios


@pytest.mark.parametrize(
    ("name", "rows", "width", "operations", "traffic"),
    # plain over ours: matrix products counted by their formulas; bytes with a fifth of room for torch's own operators
    [
        ("ssl_ey", 64, 128, 3.75, 2),
        ("ssl_ey", 64, 512, 33, 7),
        ("ssl_ey", 64, 32, 2.625, 1.4),
        ("ssl_ey", 256, 128, 2.625, 1.4),
        ("matrix_ssl", 64, 128, 13, 4),
        ("matrix_ssl", 64, 256, 65, 9),
        ("matrix_ssl", 256, 64, 4, 1.7),
        ("mec", 64, 16, 60, 8),
        ("mec", 128, 64, 13, 3.6),
        ("simdino", 64, 256, 1.5, 1.5),
        ("simdino", 256, 64, 1.5, 1.5),
        ("cissl_2", 64, 32, 1.5, 0.65),
        ("cissl_8", 64, 32, 1.5, 0.9),
        ("dissl_2", 16, 1024, None, 0.8),  # no matrix products
        ("dissl_8", 16, 1024, None, 1.1),
        ("swav_codes", 64, 300, None, 1.8),
        ("relic", 256, 128, 1, 1.1),
        ("i_vne", 64, 64, None, 1),  # the operations of solvers are not counted
        ("i_vne", 64, 256, None, 1.2),
        ("corinfomax", 512, 64, 1.45, 1.6),
        ("amdim", 128, 64, 1, 1.5),
        ("cpc", 16, 64, 1.4, 0.7),  # it reads each block of scores more than once, but does not store it
        ("lejepa", 64, 32, 0.6, 1),  # the sums in the cache count as traffic, too; cosines and sines cost the time
        ("pirl", 32, 128, None, 2.4),  # products with the whole bank, of which the published code gathers rows
        ("rectified_lpjepa", 64, 128, 1.3, 1.4),  # the targets of both views are sorted once
        pytest.param("barlow_twins", 64, 128, 1.5, 1.1, marks=pytest.mark.lightly),
        pytest.param("barlow_twins", 256, 512, 1.5, 1.1, marks=pytest.mark.lightly),
        pytest.param("vicreg", 64, 128, 1.5, 1.1, marks=pytest.mark.lightly),
        pytest.param("vicreg", 256, 512, 1.5, 1.1, marks=pytest.mark.lightly),
    ],
)
def test_work_is_less_than_that_of_the_formula(name, rows, width, operations, traffic):
    case = CASES[name]
    inputs = case.make(rows, width, "cpu")
    (plain_flops, plain_bytes, _), (our_flops, our_bytes, _) = (counted(f, inputs) for f in (case.plain, case.ours))
    assert operations is None or plain_flops >= operations * our_flops > 0
    assert plain_bytes >= traffic * our_bytes


@pytest.mark.parametrize(("name", "rows"), [("dissl_2", 64), ("dissl_8", 64), ("cissl_2", 256), ("cissl_8", 128)])
def test_losses_of_many_views_take_less_memory(name, rows):
    result = compare(name, rows, 1024 if name.startswith("dissl") else 128, repeat=1)
    assert result.ours_bytes < result.plain_bytes


@pytest.mark.slow
def test_cpc_stores_no_matrix_of_scores():
    """Predictions x locations numbers for each offset and direction, in the published form."""
    result = compare("cpc", 40, 64, repeat=1)
    rows, columns = 40 * 7 * (5 + 4 + 3 + 2 + 1), 40 * 49
    assert result.plain_bytes > 4 * 4 * rows * columns and 4 * result.ours_bytes < result.plain_bytes


def test_lejepa_stores_no_cosines():
    """Rows x directions x knots numbers, several times, in the formula."""
    result = compare("lejepa", 64, 32, repeat=1)
    assert result.plain_bytes > 3 * 4 * 2 * 64 * 1024 * 17 and 8 * result.ours_bytes < result.plain_bytes


@pytest.mark.slow
def test_rectified_lpjepa_stores_no_projections():
    """Rows x directions numbers, several for each view, in the published form; ours has blocks of a fixed size."""
    result = compare("rectified_lpjepa", 256, 64, repeat=1)
    assert result.plain_bytes > 6 * 4 * 256 * 8192 and 3 * result.ours_bytes < result.plain_bytes


def test_pirl_gathers_no_rows_of_the_bank():
    """Rows x negatives x width numbers for each of two terms, in the published code."""
    result = compare("pirl", 16, 128, repeat=1)
    assert result.plain_bytes > 2 * 4 * 16 * 4096 * 128 and 5 * result.ours_bytes < result.plain_bytes


@pytest.mark.lightly
def test_barlow_twins_computes_no_norms_of_columns():
    """Norms of columns take six to nine times as long as sums of squares. The one call is for the norms of C's rows."""
    case = CASES["barlow_twins"]
    assert counted(case.ours, case.make(256, 64, "cpu"))[2]["linalg_vector_norm"] == 1


def test_i_vne_solves_once_for_all_views():
    """One batched eigendecomposition in place of a singular value decomposition for each view."""
    case = CASES["i_vne"]
    inputs = case.make(16, 32, "cpu")
    assert counted(case.plain, inputs)[2]["_linalg_svd"] == 2
    calls = counted(case.ours, inputs)[2]
    assert (calls["_linalg_eigh"], calls["_linalg_svd"]) == (1, 0)


def test_kmeans_searches_the_scores_by_pooling():
    """Tensor.max and sorting by label take as long as the products."""
    case = CASES["kmeans"]
    calls = counted(case.ours, case.make(256, 16, "cpu"))[2]
    assert 1 < calls["max_pool2d_with_indices"] == calls["addmm"] <= 21
    assert calls["max"] == calls["argmax"] == calls["sort"] == calls["_embedding_bag"] == 0


def test_predictor_solves_once_by_the_symmetric_solver():
    """The general solver takes about 25 D³ operations, the symmetric one 9 D³; each is one call."""
    case = CASES["closed_form_predictor"]
    inputs = case.make(64, 16, "cpu")
    assert counted(case.plain, inputs)[2]["linalg_eig"] == 1
    calls = counted(case.ours, inputs)[2]
    assert (calls["_linalg_eigh"], calls["linalg_eig"]) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows", "width"), [("ssl_ey", 256, 1024), ("matrix_ssl", 256, 512)])
def test_fewer_operations_take_less_time(name, rows, width, one_thread):
    """A tenth of the operations takes at most half of the processor time, to which other programs do not add."""
    case = CASES[name]
    inputs, fastest = case.make(rows, width, "cpu"), []
    for function in (case.plain, case.ours):
        times = []
        for _ in range(3):
            begin = time.process_time()
            function(*inputs)
            times.append(time.process_time() - begin)
        fastest.append(min(times))
    assert counted(case.plain, inputs)[0] > 10 * counted(case.ours, inputs)[0]
    assert fastest[0] > 2 * fastest[1]
