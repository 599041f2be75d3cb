"""The runner, on commands that take no time: what runs, what is skipped, what a failure does, what is written down."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.experiments import run as experiments
from plugins.experiments.suites import Request, Run, Step, Suite, runner, solo
from plugins.experiments.suites.runner import Runner

WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


def touch(folder, name="score.json", text="90"):
    """A command that writes one file."""
    return ("-c", WRITE, str(folder / name), text)


def fake_run(out, method, *, seed=0, steps=None, needs=()):
    folder = out / "toy" / "solo" / method / f"seed{seed}"
    return Run(
        framework="solo",
        method=method,
        dataset="toy",
        seed=seed,
        folder=folder,
        steps=steps or (Step("score", touch(folder)),),
        collect=lambda run: {"epochs": 1, "knn": float(json.loads((run.folder / "score.json").read_text()))},
        needs=needs,
    )


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    return []


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A suite of two methods and a baseline; the second method fails where ``broken`` is among its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    chosen = {"methods": ["good", "better"]}

    def runs(request):
        folders = []
        for seed in request.seeds:
            for method in chosen["methods"]:
                code = "print('one'); print('the reason'); raise SystemExit(3)"
                steps = (Step("score", ("-c", code)),) if method == "broken" else None
                folders.append(fake_run(request.out, method, seed=seed, steps=steps))
        return folders

    toy = Suite(
        title="toy",
        folder="toy",
        frameworks={"solo": runs},
        prepare=lambda runs, request: [touch(Path(), "prepared")],
        report=("-c", "import sys; print('report of', sys.argv[1])"),
    )
    monkeypatch.setitem(experiments.SUITES, "toy", toy)
    return chosen


def test_all_runs_finish_and_leave_results(suite, tmp_path, capfd):
    assert experiments.main(["toy", "--seeds", "2"]) == 0
    assert (tmp_path / "prepared").is_file()
    found = sorted(tmp_path.glob("results/toy/solo/*/seed*/result.json"))
    assert [path.parts[-3:-1] for path in found] == [
        (method, seed) for method in ("better", "good") for seed in ("seed0", "seed1")
    ]
    result = json.loads(found[-1].read_text())
    assert {key: result[key] for key in ("framework", "method", "dataset", "seed", "epochs", "knn")} == {
        "framework": "solo",
        "method": "good",
        "dataset": "toy",
        "seed": 1,
        "epochs": 1,
        "knn": 90.0,
    }
    output = capfd.readouterr().out
    assert "4 runs finished, 0 failed" in output
    assert output.index("solo/good/seed1: finished") < output.index("report of results/toy")


def test_finished_runs_are_skipped_and_say_so(suite, tmp_path, capfd):
    experiments.main(["toy"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    capfd.readouterr()
    assert experiments.main(["toy"]) == 0
    output = capfd.readouterr().out
    assert output.count("skipped") == 2
    assert "finished in" not in output
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}


def test_a_failing_run_stops_no_other_and_sets_the_status(suite, tmp_path, capfd):
    suite["methods"] = ["broken", "good"]
    assert experiments.main(["toy", "--jobs", "1"]) == 1
    output = capfd.readouterr()
    assert "solo/broken/seed0: FAILED: score ended with status 3" in output.out
    assert str(Path("results/toy/solo/broken/seed0/log.txt")) in output.out
    assert "    | the reason" in output.out
    assert "failed: solo/broken/seed0" in output.err
    assert (tmp_path / "results/toy/solo/good/seed0/result.json").is_file()
    assert not (tmp_path / "results/toy/solo/broken/seed0/result.json").exists()
    assert "report of" in output.out


def test_failing_preparation_runs_nothing(suite, monkeypatch, tmp_path, capfd):
    broken = replace(experiments.SUITES["toy"], prepare=lambda *_: [("-c", "raise SystemExit(1)")])
    monkeypatch.setitem(experiments.SUITES, "toy", broken)
    assert experiments.main(["toy"]) == 1
    assert "preparation failed" in capfd.readouterr().err
    assert not (tmp_path / "results").exists()


def test_preparation_that_has_said_what_is_missing_speaks_alone(suite, monkeypatch, tmp_path, capfd):
    code = "import sys; sys.exit(print('error: no images', file=sys.stderr) or 2)"
    monkeypatch.setitem(
        experiments.SUITES, "toy", replace(experiments.SUITES["toy"], prepare=lambda *_: [("-c", code)])
    )
    assert experiments.main(["toy"]) == 2
    assert capfd.readouterr().err == "error: no images\n"
    assert not (tmp_path / "results").exists()


def test_dry_run_prints_the_commands_and_runs_none(suite, tmp_path, capsys):
    assert experiments.main(["toy", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    commands = [line for line in output.splitlines() if not line.startswith("#")]
    assert len(commands) == 4
    # Each line is the command itself: given to a shell, it does what the runner would have done.
    (tmp_path / "results/toy/solo/good/seed0").mkdir(parents=True)
    for command in commands:
        if "good" in command:
            subprocess.run(command, shell=True, check=True)
    assert (tmp_path / "results/toy/solo/good/seed0/score.json").read_text() == "90"


def test_list_names_the_runs_and_their_state(suite, capsys):
    experiments.main(["toy", "--only", "good"])
    capsys.readouterr()
    assert experiments.main(["toy", "--list"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["solo/good/seed0", "finished"],
        ["solo/better/seed0", "to", "do"],
    ]


@pytest.mark.parametrize(("pattern", "names"), [("good", ["good"]), ("solo/b*", ["better"]), ("er/", ["better"])])
def test_only_selects_by_part_of_the_name(suite, capsys, pattern, names):
    assert experiments.main(["toy", "--list", "--only", pattern]) == 0
    assert [line.split("/")[1] for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nonsense"],
            "unknown suite 'nonsense'; the suites are: digits, implicit_var_reg, ssl_ey, dissl_table1_contrastive, "
            "dissl_table1_distillation, dissl_fig7a, dissl_fig7c, matrix_ssl, self_supervised_vision, toy_dynamics, "
            "toy",
        ),
        (["toy_dynamics", "--seeds", "2"], "suite toy_dynamics has no --seeds"),
        (["toy_dynamics", "--epochs", "2"], "suite toy_dynamics has no --epochs"),
        (["digits", "--data", "cifar10"], "suite digits has no --data"),
        (
            ["ssl_ey", "--data", "cifar10,stl10"],
            "suite ssl_ey has no data set 'stl10'; it has: cifar10, cifar100, imagenet100, digits",
        ),
        (
            ["toy", "--only", "nothing"],
            "--only nothing matches no run; the runs are: solo/good/seed0, solo/better/seed0",
        ),
        (["toy", "--framework", "keras"], "suite toy has no framework 'keras'; it has: solo, all"),
        (["toy", "--all", "--framework", "solo"], "--all and --framework solo exclude each other; give one of them"),
        (["toy", "--seeds", "0"], "argument --seeds: must be an integer, at least 1, got '0'"),
        (["toy", "--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs?"),
    ],
)
def test_mistakes_are_told_in_one_sentence(suite, tmp_path, capsys, arguments, message):
    assert experiments.main(arguments) == 2
    hint = "; see --help" if message.startswith("argument ") else ""
    assert capsys.readouterr().err == f"error: {message}{hint}\n"
    assert list(tmp_path.iterdir()) == []


def test_check_runs_nothing(suite, tmp_path):
    assert experiments.main(["toy", "--check"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on_with_the_step_that_failed(tmp_path, lines):
    folder = tmp_path / "toy" / "solo" / "method" / "seed0"
    append = "import sys; open(sys.argv[1], 'a').write('x')"
    first = Step("first", ("-c", append, str(tmp_path / "count")))
    steps = (first, Step("second", ("-c", f"import os; os.stat({str(tmp_path / 'ready')!r})")))
    run = fake_run(tmp_path, "method", steps=(*steps, Step("score", touch(folder))))
    assert list(Runner([run], jobs=1, report_line=lines.append).go().failed) == [run.name]
    (tmp_path / "ready").touch()
    assert Runner([run], jobs=1, report_line=lines.append).go().finished == [run.name]
    assert (tmp_path / "count").read_text() == "x"
    assert set(json.loads(run.result.read_text())["step_seconds"]) == {"first", "second", "score"}


def test_the_beginning_of_another_run_is_not_continued(tmp_path, lines):
    broken = Step("second", ("-c", "raise SystemExit(1)"))
    run = fake_run(tmp_path, "method", steps=(Step("first", ("-c", "lr = 1")), broken))
    Runner([run], jobs=1, report_line=lines.append).go()
    other = fake_run(tmp_path, "method", steps=(Step("first", ("-c", "lr = 2")), broken))
    outcome = Runner([other], jobs=1, report_line=lines.append).go()
    assert "started with other settings" in outcome.failed[other.name]


def test_a_run_waits_for_what_it_needs(tmp_path, lines):
    base = fake_run(tmp_path, "base")
    read = ("-c", f"import os; os.stat({str(base.result)!r})")
    steps = (Step("read", read), Step("score", touch(tmp_path / "toy/solo/heir/seed0")))
    heir = fake_run(tmp_path, "heir", steps=steps, needs=(base.name,))
    assert Runner([heir, base], jobs=2, report_line=lines.append).go().finished == [base.name, heir.name]


def test_a_run_does_not_start_when_what_it_needs_has_failed(tmp_path, lines):
    base = fake_run(tmp_path, "base", steps=(Step("score", ("-c", "raise SystemExit(1)")),))
    heir = fake_run(tmp_path, "heir", needs=(base.name,))
    outcome = Runner([base, heir], jobs=2, report_line=lines.append).go()
    assert outcome.failed[heir.name] == "not started: it needs solo/base/seed0, which failed"


def test_selecting_a_run_selects_what_it_needs(tmp_path):
    base, heir, other = fake_run(tmp_path, "base"), fake_run(tmp_path, "heir", needs=("solo/base/seed0",)), None
    other = fake_run(tmp_path, "other")
    assert experiments.select([base, heir, other], "heir") == [base, heir]
    base.folder.mkdir(parents=True)
    heir.folder.mkdir(parents=True)
    heir.result.write_text("{}")
    assert experiments.select([base, heir, other], "heir") == [heir]


def test_unexpected_output_is_a_failure_of_that_run(tmp_path, lines):
    run = fake_run(tmp_path, "method", steps=(Step("score", ("-c", "pass")),))
    outcome = Runner([run], jobs=1, report_line=lines.append).go()
    assert "output files are invalid" in outcome.failed[run.name]
    assert not run.result.exists()


def test_runs_go_side_by_side_with_one_thread_each(tmp_path, lines):
    def meet(mine, other):
        code = (
            "import os, sys, time, pathlib\n"
            "assert os.environ['OMP_NUM_THREADS'] == '1'\n"
            "pathlib.Path(sys.argv[1]).touch()\n"
            "while not os.path.exists(sys.argv[2]): time.sleep(0.01)"
        )
        return Step("meet", ("-c", code, str(tmp_path / mine), str(tmp_path / other)))

    runs = [
        fake_run(tmp_path, mine, steps=(meet(mine, other), Step("score", touch(tmp_path / f"toy/solo/{mine}/seed0"))))
        for mine, other in (("a", "b"), ("b", "a"))
    ]
    assert len(Runner(runs, jobs=2, report_line=lines.append).go().finished) == 2


def test_interrupt_ends_the_processes_and_keeps_what_is_finished(tmp_path, lines):
    sleeper = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    )
    good = fake_run(tmp_path, "good")
    endless = fake_run(tmp_path, "endless", steps=(Step("sleep", ("-c", sleeper)),))

    def report_line(line):
        lines.append(line)
        if "good/seed0: finished" in line:
            while not endless.log.exists() or len(endless.log.read_text().splitlines()) < 4:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner([good, endless], jobs=2, report_line=report_line).go()
    assert good.result.is_file()
    assert not endless.result.exists()
    grandchild = int(endless.log.read_text().splitlines()[-1])
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and _alive(grandchild):
        time.sleep(0.02)
    assert not _alive(grandchild)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_terminating_the_runner_ends_with_status_130(tmp_path):
    code = (
        "import sys; from plugins.experiments import run as e, suites as s; from pathlib import Path\n"
        "run = s.Run('solo', 'm', 'toy', 0, Path('m'), (s.Step('s', ('-c', 'import time; time.sleep(1000)')),), dict)\n"
        "e.SUITES['toy'] = s.Suite('toy', 'toy', {'solo': lambda request: [run]})\n"
        "sys.exit(e.main(['toy']))"
    )
    root = Path(experiments.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "m" / "steps.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error


def test_progress_reads_the_epoch_from_the_metrics(tmp_path):
    assert solo.progress(tmp_path) is None
    (tmp_path / "args.json").write_text('{"max_epochs": 25}')
    assert solo.progress(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,loss\n")
    assert solo.progress(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1.0\n1,0.5\n,0.4\n")
    assert solo.progress(tmp_path) == (2, 25, 0.5, None)
    (tmp_path / "metrics.csv").write_text("epoch,train_ssl_loss_epoch,val_acc1\n0,1.0,\n0,,3\n")
    assert solo.progress(tmp_path) == (1, 25, 1.0, 3.0)


def test_remaining_time_is_work_over_places(tmp_path, lines):
    found = Runner([fake_run(tmp_path, name) for name in "abcd"], jobs=2, report_line=lines.append)
    assert found._seconds_left() is None
    found.outcome.seconds = [10.0, 20.0]
    assert found._seconds_left() == pytest.approx(30.0)


def test_a_suite_says_how_many_runs_go_at_a_time(suite, monkeypatch, capfd):
    monkeypatch.setattr(experiments, "_cores", lambda: 2)
    monkeypatch.setitem(experiments.SUITES, "toy", replace(experiments.SUITES["toy"], jobs=lambda request: 1))
    experiments.main(["toy", "--only", "good"])
    experiments.main(["toy"])
    assert "1 run, 1 at a time" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["vissl/a", "solo/b"]),
        (["--framework", "all"], ["solo/a", "solo/b", "vissl/a", "vissl/b"]),
        (["--all"], ["solo/a", "solo/b", "vissl/a", "vissl/b"]),
        (["--all", "--only", "b"], ["solo/b", "vissl/b"]),
        (["--framework", "vissl"], ["vissl/a", "vissl/b"]),
        (["--only", "b"], ["solo/b"]),
        (["--only", "vissl/b"], ["vissl/b"]),
        (["--framework", "vissl", "--only", "b"], ["vissl/b"]),
    ],
)
def test_the_sample_is_the_default_and_options_select_from_all_runs(tmp_path, monkeypatch, capsys, options, names):
    def runs(framework):
        return lambda request: [replace(fake_run(tmp_path, method), framework=framework) for method in "ab"]

    frameworks = {"solo": runs("solo"), "vissl": runs("vissl")}
    suite = Suite(title="two", folder="two", frameworks=frameworks, sample=(("vissl", "a"), ("solo", "b")))
    monkeypatch.setattr(experiments, "SUITES", {"two": suite})
    assert experiments.main(["two", "--list", *options]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"{name}/seed0" for name in names]


@pytest.mark.slow
def test_the_sample_of_the_digits_exists_and_covers_all_frameworks(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(experiments.__file__).parents[2])
    suite = experiments.SUITES["digits"]
    names = [run.name for run in experiments._of_frameworks(suite, None, None, Request(out=tmp_path, seeds=(0, 1)))]
    assert names[: len(names) // 2] == [f"{framework}/{method}/seed0" for framework, method in suite.sample]
    assert names[len(names) // 2 :] == [f"{framework}/{method}/seed1" for framework, method in suite.sample]
    assert {framework for framework, _ in suite.sample} == set(suite.frameworks)


def test_imports_begin_before_the_data_are_prepared(suite, monkeypatch, tmp_path, capfd):
    order = []
    step = Step("pretrain", ("-m", "solo_ext.main_pretrain"))
    toy = replace(experiments.SUITES["toy"], frameworks={"solo": lambda _: [fake_run(tmp_path, "m", steps=(step,))]})
    monkeypatch.setitem(experiments.SUITES, "toy", toy)
    monkeypatch.setattr(experiments, "start_server", lambda environment: order.append(environment["OMP_NUM_THREADS"]))
    monkeypatch.setattr(experiments, "_call", lambda arguments: order.append("prepare") or 2)
    assert experiments.main(["toy"]) == 2
    assert order == ["1", "prepare"]


def test_a_run_of_other_length_is_skipped_with_its_number_of_epochs(tmp_path):
    run = replace(fake_run(tmp_path, "good"), epochs=2)
    run.folder.mkdir(parents=True)
    for epochs, found in (
        (1, "finished with 1 epoch, not 2"),
        (None, "finished with an unknown number of epochs, not 2"),
    ):
        run.result.write_text(json.dumps({"epochs": epochs}))
        assert found in experiments._skipped(run)
