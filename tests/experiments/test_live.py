"""The live table of a suite: what a terminal shows, and when plain lines are printed instead."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from plugins.experiments import live
from plugins.experiments.suites import Progress, Run, Step, runner
from plugins.experiments.suites.runner import Runner, Status


def terminal(**options):
    return Console(file=io.StringIO(), force_terminal=True, width=150, height=30, _environ={}, **options)


def printed(statuses, *, rows=20, title="title"):
    console = terminal(color_system="standard")
    console.print(live.make_table(statuses, title, rows=rows))
    return console.file.getvalue().splitlines()


def line_of(lines, name):
    (line,) = [line for line in lines if name in line]
    return line


def test_a_row_shows_state_epoch_loss_eta_and_time():
    running = Status("solo/a/seed0", "pretrain", progress=Progress(3, 20, 1.23456), seconds=61, eta=345.0)
    lines = printed([running, Status("solo/b/seed0")], title="0:10  0 of 2 done")
    assert "0:10  0 of 2 done" in "".join(lines)
    row = line_of(lines, "solo/a/seed0")
    for text in ("pretrain", "━", "3/20", "1.235", "5:45", "1:01"):
        assert text in row
    assert "waiting" in line_of(lines, "solo/b/seed0")


def test_a_failed_row_is_red_and_names_the_log():
    row = line_of(printed([Status("solo/a/seed0", "failed", detail="log: results/a/log.txt")]), "solo/a/seed0")
    assert "\x1b[31m" in row and "results/a/log.txt" in row


def test_markup_in_a_log_path_is_printed_as_it_is():
    row = line_of(printed([Status("solo/a/seed0", "failed", detail="log: out[1]/[red]/log.txt")]), "solo/a/seed0")
    assert "out[1]/[red]/log.txt" in row


def test_a_low_terminal_keeps_active_and_failed_runs():
    states = ["finished", "failed", "waiting", "knn", "finished", "pretrain", "waiting"]
    text = "\n".join(printed([Status(f"run{index}", state) for index, state in enumerate(states)], rows=3))
    assert [f"run{index}" in text for index in range(7)] == [False, True, False, True, False, True, False]


@pytest.mark.parametrize(
    "console",
    [
        Console(file=io.StringIO(), force_terminal=False, _environ={}),
        Console(file=io.StringIO(), force_terminal=True, _environ={"NO_COLOR": "1"}),
        Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}),
    ],
    ids=["no terminal", "NO_COLOR", "TERM=dumb"],
)
def test_without_a_terminal_there_is_no_table(console):
    with live.live_table(console) as table:
        assert table is None
    assert console.file.getvalue() == ""


def test_standard_output_of_a_test_is_no_terminal():
    with live.live_table() as table:
        assert table is None


def _run(out, method, code="pass", progress=None):
    return Run(
        framework="solo",
        method=method,
        dataset="toy",
        seed=0,
        folder=out / method,
        steps=(Step("pretrain", ("-c", code)),),
        collect=lambda run: {"knn": 90.0},
        progress=lambda folder: progress,
    )


def test_the_runner_draws_the_table_and_prints_only_failures_above_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    runs = [
        _run(tmp_path, "good", progress=Progress(2, 2, 0.25)),
        _run(tmp_path, "bad", "print('the reason'); raise SystemExit(3)", Progress(1, 2)),
    ]
    console, drawn = terminal(), []
    with live.live_table(console) as table:

        def show(statuses, title):
            drawn.append([(status.state, status.eta is not None) for status in statuses])
            table.update(statuses, title)

        found = Runner(runs, jobs=1, report_line=table.report_line, show=show)
        outcome = found.go()
    assert (outcome.finished, list(outcome.failed)) == (["solo/good/seed0"], ["solo/bad/seed0"])
    assert drawn[0] == [("pretrain", True), ("waiting", False)]
    good, bad = found.statuses.values()
    assert (good.state, good.progress, good.detail) == ("finished", Progress(2, 2, 0.25), "kNN 90.0")
    assert (bad.state, bad.progress, Path(bad.detail.removeprefix("log: "))) == ("failed", Progress(1, 2), runs[1].log)
    text = console.file.getvalue()
    assert "solo/bad/seed0: FAILED: pretrain ended with status 3" in text and "    | the reason" in text
    assert "finished in" not in text  # a plain line
    assert text.rstrip().endswith("\x1b[2K")  # the table is erased at the end
