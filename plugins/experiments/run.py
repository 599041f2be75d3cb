"""Run a suite of experiments: ``python -m plugins.experiments digits``.

Several runs are active at a time. A finished run (its ``result.json`` exists) is skipped, an interrupted run continues
with the command that was interrupted, and a failed run does not stop the others. The suites are defined in
:mod:`plugins.experiments.suites`. With ``--cluster``, each run is a job of its own: :mod:`plugins.experiments.cluster`.
"""

import argparse
import fnmatch
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from plugins.experiments import cluster
from plugins.experiments.live import live_table
from plugins.experiments.status import format_table, read_states
from plugins.experiments.suites import Request, Run, Suite, dissl, lightly, matrix_ssl, solo, ssv, toy, vissl
from plugins.experiments.suites.runner import ENVIRONMENT, THREADS, Outcome, Runner, is_warm, shell
from plugins.experiments.warm import start_server
from plugins.spelling import counted
from plugins.tools.command import Parser, UserError, integer_from, key_value, minutes
from plugins.tools.records import read_json

DAY = 24 * 60
"""Default time limit of a job, in minutes."""
DIGITS_SAMPLE = (
    ("solo", "cissl"),
    ("solo", "untrained"),
    ("solo", "isoloss"),
    ("lightly", "isoloss"),
    ("vissl", "isoloss"),
    ("solo", "ssl_ey"),
    ("solo", "matrix_ssl"),
    ("solo", "supervised"),
)
"""Default runs of the suite ``digits``. The fastest method starts first, so that a result appears early. The untrained
backbone, which the supervised run needs, is evaluated at the same time."""

SUITES: dict[str, Suite] = {
    "digits": Suite(
        title="a sample of the methods (--all: every method) and two baselines on 1797 real handwritten digits",
        folder="digits",
        frameworks={"solo": solo.digits, "lightly": lightly.digits, "vissl": vissl.digits},
        sample=DIGITS_SAMPLE,
        options=("seeds", "epochs"),
        prepare=solo.prepare,
    ),
    "implicit_var_reg": Suite(
        title="the 40 runs of arXiv:2212.04858: ten methods on CIFAR-10, CIFAR-100, STL-10 and TinyImageNet",
        folder="implicit_var_reg",
        frameworks={"solo": solo.implicit_var_reg},
        options=("seeds", "epochs", "devices", "data"),
        datasets=(*solo.IMPLICIT_VAR_REG_DATA, "digits"),
        prepare=solo.prepare,
        report=("-m", "plugins.experiments.report", "--by-dataset"),
        jobs=solo.one_at_a_time,
    ),
    "ssl_ey": Suite(
        title="SSL-EY with and without projector on CIFAR-10, CIFAR-100 and ImageNet-100",
        folder="ssl_ey",
        frameworks={"solo": solo.ssl_ey},
        options=("seeds", "epochs", "devices", "data"),
        datasets=(*solo.SSL_EY_DATA, "digits"),
        prepare=solo.prepare,
        report=("-m", "plugins.experiments.report", "--by-dataset"),
        jobs=solo.one_at_a_time,
    ),
    **{
        name: Suite(
            title=title,
            folder=name,
            frameworks={"solo": dissl.run_lister(name)},
            options=("seeds", "epochs", "devices", "data"),
            datasets=tuple(dissl.SWEEPS),
            prepare=solo.prepare,
            report=("-m", "plugins.experiments.report_dissl"),
            jobs=solo.one_at_a_time,
        )
        for name, title in dissl.TITLES.items()
    },
    "matrix_ssl": Suite(
        title="Matrix-SSL and MEC on ImageNet: 100 to 400 epochs, linear probing, backbones for COCO",
        folder="matrix_ssl",
        frameworks={"solo": matrix_ssl.in_solo, "vissl": matrix_ssl.in_vissl},
        options=("seeds", "epochs", "devices", "data"),
        datasets=(*matrix_ssl.DATA, "digits"),
        prepare=solo.prepare,
        report=("-m", "plugins.experiments.report", "--by-dataset"),
        jobs=solo.one_at_a_time,
    ),
    "self_supervised_vision": Suite(
        title="twelve methods on six networks, CIFAR-10 or CIFAR-100, by the commands of Self-Supervised-Vision",
        folder="self_supervised_vision",
        frameworks={"solo": ssv.runs},
        options=("seeds", "epochs", "devices", "data"),
        datasets=ssv.DATA,
        prepare=solo.prepare,
        report=("-m", "plugins.experiments.report_ssv"),
        jobs=solo.one_at_a_time,
    ),
    "toy_dynamics": Suite(
        title="eigenvalue dynamics of the linear toy model, theory and simulation: figures within a minute",
        folder="toy_dynamics",
        frameworks={"numpy": toy.toy_dynamics},
        options=(),
        report=("-m", "plugins.experiments.toy_dynamics", "--table"),
    ),
}


def select(runs: Sequence[Run], pattern: str | None) -> list[Run]:
    """Select the runs whose name contains a pattern, and the runs that they need.

    Args:
        runs: the runs of the suite.
        pattern: part of a name, with the wildcards ``*`` and ``?``; None selects all.

    Returns:
        The selected runs in their order.

    Raises:
        UserError: no name matches.
    """
    if pattern is None:
        return list(runs)
    chosen = {run.name for run in runs if _matches(run, pattern)}
    if not chosen:
        raise UserError(f"--only {pattern} matches no run; the runs are: {', '.join(run.name for run in runs)}")
    needed = {name for run in runs if run.name in chosen and not run.result.is_file() for name in run.needs}
    return [run for run in runs if run.name in chosen | needed]


def _matches(run: Run, pattern: str) -> bool:
    return fnmatch.fnmatchcase(run.name, f"*{pattern}*")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Only the standard library is imported.

    Raises:
        UserError: the command line is invalid.
    """
    parser = Parser(
        prog="python -m plugins.experiments",
        description="Run a suite of experiments. Finished runs are skipped, interrupted runs continue.",
        epilog="suites:\n" + "\n".join(f"  {name:26} {suite.title}" for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("suite", metavar="SUITE", help=f"one of {', '.join(SUITES)}")
    add("--all", action="store_true", help="all methods in all frameworks (digits: instead of a sample)")
    add("--framework", metavar="NAME", help="all methods in this framework (all: the same as --all)")
    add("--only", metavar="PATTERN", help="only runs whose name contains this pattern; * and ? are wildcards")
    add("--seeds", type=integer_from(1), metavar="N", help="seeds 0 to N-1 (default: 1)")
    add("--epochs", type=integer_from(1), metavar="N", help="pre-training epochs (default: those of the YAML file)")
    add(
        "--devices",
        type=integer_from(1),
        metavar="N",
        help="GPUs per pre-training, each with the YAML file's batch size",
    )
    add("--data", metavar="NAME,...", help="data sets (default: all of the suite); digits is for a quick trial")
    add(
        "--data-folder",
        type=Path,
        default=Path("datasets"),
        metavar="FOLDER",
        help="folder of the data sets (default: datasets)",
    )
    add(
        "--jobs",
        type=integer_from(1),
        metavar="N",
        help="concurrent runs (default: one per core; 1 if runs need a GPU); with --cluster slurm, concurrent jobs of "
        "each job array (default: 256)",
    )
    add("--out", type=Path, default=Path("results"), metavar="FOLDER", help="folder of the results (default: results)")
    add("--list", action="store_true", help="list the runs and exit")
    add("--dry-run", action="store_true", help="print the commands and exit")
    add("--status", action="store_true", help="show state, epoch, loss and accuracy of each run, and exit")
    add("--report", action="store_true", help="make the report of the finished runs, and exit")
    add("--check", action="store_true", help="check the command line and exit")
    add("--job", metavar="RUN", help=argparse.SUPPRESS)  # the command of a job
    add("--token", metavar="TOKEN", help=argparse.SUPPRESS)
    jobs = parser.add_argument_group("jobs of a cluster, one per run")
    add = jobs.add_argument
    add(
        "--cluster",
        choices=("slurm", "local"),
        help="slurm: submit the runs that are neither finished nor in the queue, and exit; jobs are requeued after "
        "their time limit and continue. local: execute the same jobs on this machine, and wait",
    )
    add("--partition", metavar="NAME", help="partition of the cluster")
    add("--time", type=minutes, metavar="TIME", help="time limit of a job: [D-]HH:MM:SS or minutes (default: 1 day)")
    add("--gpus", type=integer_from(0), metavar="N", help="GPUs of a job (default: as many as its training uses)")
    add("--cpus", type=integer_from(1), metavar="N", help="CPU cores of a job")
    add("--mem", metavar="SIZE", help="memory of a job, such as 64GB")
    add(
        "--sbatch",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch, such as account=NAME or qos=NAME; may be repeated",
    )
    options = parser.parse_args(argv)
    if options.suite not in SUITES:
        raise UserError(f"unknown suite {options.suite!r}; the suites are: {', '.join(SUITES)}")
    suite = SUITES[options.suite]
    if options.all:
        if options.framework not in (None, "all"):
            raise UserError(f"--all and --framework {options.framework} exclude each other; give one of them")
        options.framework = "all"
    if options.framework not in (None, "all", *suite.frameworks):
        raise UserError(
            f"suite {options.suite} has no framework {options.framework!r}; it has: {', '.join(suite.frameworks)}, all"
        )
    for option in ("seeds", "epochs", "devices", "data"):
        if getattr(options, option) is not None and option not in suite.options:
            raise UserError(f"suite {options.suite} has no --{option}")
    _check_cluster(options)
    if options.data is not None:
        options.data = options.data.split(",")
        for name in options.data:
            if name not in suite.datasets:
                raise UserError(f"suite {options.suite} has no data set {name!r}; it has: {', '.join(suite.datasets)}")
    return options


def _check_cluster(options: argparse.Namespace) -> None:
    """Check the options of jobs, and set the default of ``--time``.

    Raises:
        UserError: an option has no effect without another one.
    """
    for name in ("partition", "cpus", "mem", "sbatch"):
        if getattr(options, name) and options.cluster != "slurm":
            raise UserError(f"--{name} is an option of SLURM's jobs; add --cluster slurm, or remove --{name}")
    for name in ("time", "gpus"):
        if getattr(options, name) is not None and options.cluster is None:
            raise UserError(
                f"--{name} is an option of jobs; add --cluster slurm or --cluster local, or remove --{name}"
            )
    options.time = options.time or DAY


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_suite(options: argparse.Namespace) -> int:
    """Run a suite, or list its runs or commands.

    Returns:
        The exit status: 1 if a run or the report failed, 2 if data are missing.

    Raises:
        UserError: no run is selected.
    """
    suite = SUITES[options.suite]
    request = Request(
        out=options.out,
        seeds=range(options.seeds or 1),
        epochs=options.epochs,
        devices=options.devices,
        data=options.data,
        data_folder=options.data_folder,
        elsewhere=options.cluster == "slurm",
    )
    if options.job is not None:
        return _execute_job(suite, options, request)
    runs = select(_of_frameworks(suite, options.framework, options.only, request), options.only)
    if options.list:
        width = max(len(run.name) for run in runs)
        for run in runs:
            print(f"{run.name:{width}}  {'finished' if run.result.is_file() else 'to do'}")
        return 0
    if options.status:
        print(format_table(read_states(_with_started(runs, suite, options, request))))
        return 0
    to_do = [run for run in runs if not run.result.is_file()]
    preparation = suite.prepare(to_do, request)
    results = options.out / suite.folder
    report = (*suite.report, str(results))
    if options.report:
        if options.dry_run:
            print(shell(report))
            return 0
        return _make_report(report)
    submission = cluster.Submission(options, results, _selection(options))
    if options.cluster is not None:
        submission.check()
    if options.dry_run:
        _print_commands(preparation, runs, report, submission)
        return 0
    for run in runs:
        if run.result.is_file():
            print(_skipped(run), flush=True)
    status = 0
    if options.cluster is None:
        states = read_states(to_do)
        cluster.print_skipped(states)
        to_do = [state.run for state in states if state.startable]
    if to_do:
        if options.cluster is None and any(is_warm(step.arguments) for run in to_do for step in run.steps):
            start_server(ENVIRONMENT)  # it imports the frameworks while the data sets are prepared
        for arguments in preparation:
            failed = _call(arguments)
            if failed == 2:  # the command has reported what is missing
                return 2
            if failed != 0:
                print(f"error: the preparation failed, no run was started: {shell(arguments)}", file=sys.stderr)
                return 1
        if options.cluster == "slurm":
            cluster.submit_to_slurm(to_do, submission)
            return 0
        jobs = min(options.jobs or suite.jobs(request) or _cores(), len(to_do))
        print(
            f"{counted(len(to_do), 'run')}, {jobs} at a time; logs in {results}/<framework>/<run>/seed<n>/log.txt",
            flush=True,
        )
        if options.cluster == "local":
            outcome = cluster.run_locally(to_do, submission, jobs=jobs)
        else:
            with live_table() as table:
                report_line = table.report_line if table else partial(print, flush=True)
                outcome = Runner(to_do, jobs=jobs, report_line=report_line, show=table.update if table else None).go()
        status = 1 if outcome.failed else 0
    status = max(status, _make_report(report))
    if to_do:
        _summarise(outcome, {run.name: run for run in to_do})
    return status


def _make_report(report: Sequence[str]) -> int:
    """Run the command of the report, and return the exit status."""
    if _call(report) == 0:
        return 0
    print(f"error: the report failed: {shell(report)}", file=sys.stderr)
    return 1


def _selection(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the options that define the runs, for the command of a job."""
    given = {
        "--seeds": options.seeds,
        "--epochs": options.epochs,
        "--devices": options.devices,
        "--data": options.data and ",".join(options.data),
        "--data-folder": options.data_folder,
        "--out": options.out,
    }
    return tuple(word for name, value in given.items() if value is not None for word in (name, str(value)))


def _execute_job(suite: Suite, options: argparse.Namespace, request: Request) -> int:
    """Execute the run of a job, without the runs that it needs: they are finished."""
    runs = {run.name: run for run in suite.frameworks[options.framework](request)}
    if options.job not in runs:
        raise UserError(f"suite {options.suite} has no run {options.job} with these options; see --list")
    return cluster.execute(replace(runs[options.job], needs=()), options.token)


def _with_started(runs: list[Run], suite: Suite, options: argparse.Namespace, request: Request) -> list[Run]:
    """Add the runs that have been started, if the selection is the default sample of the suite."""
    if suite.sample is None or options.framework is not None or options.only is not None:
        return runs
    known = {run.name for run in runs}
    others = [run for list_runs in suite.frameworks.values() for run in list_runs(request)]
    return runs + [run for run in others if run.name not in known and run.folder.is_dir()]


def _of_frameworks(suite: Suite, framework: str | None, only: str | None, request: Request) -> list[Run]:
    """List the runs of the selected frameworks; the sample of the suite if neither framework nor pattern is given.

    A pattern is applied to the first framework, and to all frameworks if it matches no run there, so that ``--only
    isoloss`` selects one run.
    """
    names = list(suite.frameworks) if framework is None or framework == "all" else [framework]
    runs = [run for name in names for run in suite.frameworks[name](request)]
    if framework is not None:
        return runs
    if only is None:
        return _sample(suite, runs)
    first = [run for run in runs if run.framework == names[0]]
    return first if any(_matches(run, only) for run in first) else runs


def _sample(suite: Suite, runs: list[Run]) -> list[Run]:
    """Select the default runs of a suite: seed by seed, in the order of the sample."""
    if suite.sample is None:
        return runs
    place = {pair: index for index, pair in enumerate(suite.sample)}
    chosen = [run for run in runs if (run.framework, run.method) in place]
    return sorted(chosen, key=lambda run: (run.seed, place[run.framework, run.method]))


def _print_commands(
    preparation: Sequence[Sequence[str]], runs: Sequence[Run], report: Sequence[str], submission: cluster.Submission
) -> None:
    for arguments in preparation:
        print(shell(arguments))
    if submission.options.cluster == "slurm":
        cluster.print_scripts(runs, submission)
    for run in runs:
        if run.result.is_file():
            print(f"# {_skipped(run)}")
            continue
        if submission.options.cluster == "slurm":
            continue
        print(f"# {run.name}")
        for step in run.steps:
            print(shell(step.arguments))
    print("# report")
    print(shell(report))


def _skipped(run: Run) -> str:
    epochs = read_json(run.result).get("epochs")
    if run.epochs is not None and epochs != run.epochs:
        found = "an unknown number of epochs" if epochs is None else counted(epochs, "epoch")
        return f"{run.name}: skipped, finished with {found}, not {run.epochs}; delete {run.folder} to repeat it"
    return f"{run.name}: skipped, finished before ({run.result})"


def _summarise(outcome: Outcome, runs: Mapping[str, Run]) -> None:
    skipped = f", {len(outcome.skipped)} skipped" if outcome.skipped else ""
    print(f"{counted(len(outcome.finished), 'run')} finished, {len(outcome.failed)} failed{skipped}", flush=True)
    for name, why in outcome.failed.items():
        print(f"failed: {name}: {why}; log: {runs[name].log}", file=sys.stderr, flush=True)


def _call(arguments: Sequence[str]) -> int:
    """Run a command in the foreground and return its exit status."""
    return subprocess.run([sys.executable, *arguments], env={**os.environ, **THREADS}, check=False).returncode


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 (a run failed), 2 (invalid command line or data) or 130."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        options = parse(argv)
        return 0 if options.check else run_suite(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, repeat the command to continue with the others", file=sys.stderr)
        return 130
