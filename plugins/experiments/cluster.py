"""Execute each run of a suite as a job of its own: ``--cluster slurm``, or ``--cluster local`` on this machine.

submitit submits the jobs. Runs with the same resources form a job array; a run that needs another one depends on its
job. A job executes ``python -m plugins.experiments SUITE --job RUN``. A job that reaches its time limit or is preempted
is requeued, and the run continues with the command that was interrupted, from its newest checkpoint.

Before a run is submitted, a token is written to ``job.json`` in its folder. A job whose token is not in that file ends
without executing anything, and a job that executes a run locks the run's folder. So several people can submit the same
suite from the same folder: a run in the queue is not submitted again, and never executed twice.
"""

import argparse
import getpass
import io
import os
import secrets
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.experiments.status import JOB, State, read_job, read_states
from plugins.experiments.suites import Run
from plugins.experiments.suites.runner import FAILURE, Outcome, Runner, clock, format_scores
from plugins.install import not_installed
from plugins.spelling import counted
from plugins.tools.command import UserError
from plugins.tools.process import hold_folder
from plugins.tools.records import read_json, write_json

JOBS = "jobs"
"""The folder in the suite's results for scripts, logs and pickles of the jobs."""
_LOCK = ".submission-lock"
LOCK_SECONDS = 120.0
"""Time to wait until another submission of the same suite has ended."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Submission:
    """The options of the command line that concern jobs.

    Args:
        options: the parsed command line.
        results: folder of the suite's results.
        arguments: options that select the runs, for the command of a job.
    """

    options: argparse.Namespace
    results: Path
    arguments: tuple[str, ...]

    def command(self, run: Run, token: str) -> Any:
        """Return the function that a job executes: the command that executes one run."""
        given = ("-m", "plugins.experiments", self.options.suite, "--framework", run.framework, *self.arguments)
        return _slurm().Command((*given, "--job", run.name, "--token", token))

    def executor(self, gpus: int, *, dry_run: bool = False, **more: Any) -> Any:
        """Return submitit's executor for jobs with this number of GPUs."""
        options = self.options
        sbatch = {"requeue": True, **dict(options.sbatch)}  # SLURM also requeues jobs whose node fails
        if "dependency" in more:
            sbatch.setdefault("kill-on-invalid-dep", "yes")
        if options.jobs is not None and options.cluster == "slurm":
            more["array_parallelism"] = options.jobs
        given = argparse.Namespace(
            cluster=options.cluster,
            dry_run=dry_run,
            folder=self.results / JOBS,
            name=f"ssl-{options.suite}",
            time=options.time,
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=gpus if options.gpus is None else options.gpus,
            cpus_per_task=options.cpus,
            mem=options.mem,
            partition=options.partition,
            sbatch=list(sbatch.items()),
        )
        return _slurm().make_executor(given, **more)

    def check(self) -> None:
        """Check that submitit and, unless the scripts are only printed, SLURM are installed.

        Raises:
            UserError: one of them is missing.
        """
        _slurm()
        if self.options.cluster == "slurm" and not self.options.dry_run:
            self.executor(0)

    def log(self, number: str) -> Path:
        """Return the file with the output of a job."""
        return self.results / JOBS / f"{number}_0_log.out"


def _slurm() -> Any:
    """Import the module that needs submitit.

    Raises:
        UserError: submitit is not installed.
    """
    try:
        from plugins.tools import slurm
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "submitit":
            raise
        raise UserError(f"--cluster needs submitit: {not_installed('submitit')}") from None
    return slurm


# ------------------------------------------------------------------------------------------------------- claims


@contextmanager
def _submission_lock(results: Path) -> Iterator[None]:
    """Let one process at a time decide which runs to submit. It is held for the seconds that sbatch takes.

    Raises:
        UserError: another process holds the lock for longer than ``LOCK_SECONDS``, or the folder is not writable.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            file = hold_folder(results, _LOCK)
            break
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
        except OSError as error:
            raise UserError(f"{error.filename or results} cannot be written: {error.strerror}") from None
    with file:
        yield


def _claim(run: Run, cluster: str) -> str:
    """Write job.json without the number of the job, and return its token."""
    token = secrets.token_hex(8)
    claim = {"token": token, "cluster": cluster, "id": None, "user": _user(), "host": socket.gethostname()}
    write_json(run.folder / JOB, {**claim, "submitted": time.strftime("%Y-%m-%d %H:%M:%S")})
    return token


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in a container
        return str(os.getuid())


def _record(run: Run, number: str, log: Path) -> None:
    write_json(run.folder / JOB, {**(read_job(run) or {}), "id": number, "log": str(log)})


def print_skipped(states: Sequence[State]) -> None:
    """Print the runs that are in a queue or active, which are not started again."""
    for state in states:
        if not state.startable and state.name != "done":
            by = f" by {state.job['user']}" if state.job is not None and state.job["user"] != _user() else ""
            print(f"{state.run.name}: skipped, {state.name}{by}: {state.note}", flush=True)


# -------------------------------------------------------------------------------------------------------- SLURM


def submit_to_slurm(runs: Sequence[Run], submission: Submission) -> None:
    """Submit the runs that are neither finished nor in the queue, as job arrays.

    Args:
        runs: the runs of the suite, with the runs that they need.
        submission: the options of the jobs.

    Raises:
        UserError: SLURM is not installed or rejects a job.
    """
    with _submission_lock(submission.results):
        states = read_states(runs)
        print_skipped(states)
        numbers = {state.run.name: state.job["id"] for state in states if state.job is not None}
        chosen = [state.run for state in states if state.startable]
        active = {state.run.name for state in states if state.name == "running"}
        for run in chosen:
            other = next((name for name in run.needs if name in active and name not in numbers), None)
            if other is not None:
                raise UserError(f"{run.name} needs {other}, which is executed without a job; submit when it has ended")
        for group, needed, gpus in _groups(chosen):
            more: dict[str, Any] = (
                {"dependency": _after(needed, numbers)} if any(name in numbers for name in needed) else {}
            )
            executor = submission.executor(gpus, **more)
            tokens = [_claim(run, "slurm") for run in group]
            try:
                commands = [submission.command(run, token) for run, token in zip(group, tokens, strict=True)]
                with redirect_stderr(io.StringIO()):  # submitit prints the error too
                    jobs = executor.submit_array(commands)
            except BaseException as error:
                for run in group:
                    (run.folder / JOB).unlink(missing_ok=True)
                if not isinstance(error, Exception):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                raise UserError(f"sbatch did not accept {counted(len(group), 'job')}: {reason}") from None
            for run, job in zip(group, jobs, strict=True):
                numbers[run.name] = job.job_id
                _record(run, job.job_id, submission.log(job.job_id))
            span = jobs[0].job_id if len(jobs) == 1 else f"{jobs[0].job_id} to {jobs[-1].job_id}"
            print(f"submitted {counted(len(group), 'run')} as job {span}{_explained(more)}", flush=True)
    print("show the runs with --status, and make the report of the finished ones with --report", flush=True)


def print_scripts(runs: Sequence[Run], submission: Submission) -> None:
    """Print the sbatch scripts that :func:`submit_to_slurm` would submit, without a look at the queue."""
    chosen = [run for run in runs if not run.result.is_file()]
    names = {run.name: f"JOB_OF_{run.name}" for run in chosen}
    for group, needed, gpus in _groups(chosen):
        more = {"dependency": _after(needed, names)} if any(name in names for name in needed) else {}
        print(submission.executor(gpus, dry_run=True, **more).script(len(group)))
        for run in group:
            print(f"# {shlex.join([sys.executable, *submission.command(run, 'TOKEN').arguments])}")


def _groups(runs: Sequence[Run]) -> list[tuple[list[Run], tuple[str, ...], int]]:
    """Group runs that one array can hold: the runs, the runs that they need, and their number of GPUs.

    A group comes after those of the runs that it needs.
    """
    groups: dict[tuple[tuple[str, ...], int], list[Run]] = {}
    for run in runs:
        groups.setdefault((tuple(sorted(run.needs)), run.gpus), []).append(run)
    ordered, waiting = [], dict(groups)
    while waiting:
        ahead = {run.name for group in waiting.values() for run in group}
        ready = [key for key in waiting if not ahead.intersection(key[0])] or list(waiting)
        ordered += [(waiting.pop(key), *key) for key in ready]
    return ordered


def _after(needed: Sequence[str], numbers: dict[str, str]) -> str:
    return "afterok:" + ":".join(numbers[name] for name in needed if name in numbers)


def _explained(more: dict[str, str]) -> str:
    return f", which starts after {more['dependency'].partition(':')[2].replace(':', ', ')}" if more else ""


# ------------------------------------------------------------------------------------------------- this machine


def run_locally(runs: Sequence[Run], submission: Submission, *, jobs: int) -> Outcome:
    """Execute the runs as jobs on this machine, several at a time, and wait until they have ended.

    Args:
        runs: the runs of the suite, with the runs that they need.
        submission: the options of the jobs.
        jobs: maximal number of jobs at a time. With GPUs, each has its own.

    Returns:
        The names of the runs that finished, failed or were skipped.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts `command &` so; jobs must not inherit it
        signal.signal(signal.SIGINT, lambda number, frame: None)
    began, outcome, waiting = time.monotonic(), Outcome(), [run for run in runs if not run.result.is_file()]
    active: dict[int, tuple[Run, Any, float]] = {}

    def line(text: str) -> None:
        print(f"{clock(time.monotonic() - began)}  {text}", flush=True)

    try:
        while waiting or active:
            for place in set(range(jobs)) - set(active):
                busy = {run.name for run in waiting} | {run.name for run, *_ in active.values()}
                run = next((run for run in waiting if not busy.intersection(run.needs)), None)
                if run is None:
                    break
                waiting.remove(run)
                broken = next((name for name in run.needs if name in outcome.failed or name in outcome.skipped), None)
                if broken is not None:
                    outcome.failed[run.name] = f"not started: it needs {broken}, which has no result"
                elif isinstance(job := _start_locally(run, submission, place), State):
                    outcome.skipped[run.name] = f"{job.name}: {job.note}"
                else:
                    active[place] = run, job, time.monotonic()
                    line(f"{run.name}: job {job.job_id}")
                    continue
                line(f"{run.name}: {outcome.failed.get(run.name) or 'skipped, ' + outcome.skipped[run.name]}")
            for place, (run, job, started) in list(active.items()):
                if not job.done():
                    continue
                del active[place]
                _forget(run, job)
                if run.result.is_file():
                    outcome.finished.append(run.name)
                    took = clock(time.monotonic() - started)
                    line(f"{run.name}: finished in {took}: {format_scores(read_json(run.result))}")
                else:
                    outcome.failed[run.name] = _reason(run, submission.log(job.job_id))
                    line(f"{run.name}: FAILED: {outcome.failed[run.name]}")
            if active:
                time.sleep(POLL_SECONDS)
    finally:
        for _, job, _ in active.values():
            job.cancel()  # SIGINT, which ends the commands too
        for run, job, _ in active.values():
            job.wait()
            _forget(run, job)
    return outcome


def _start_locally(run: Run, submission: Submission, place: int) -> Any:
    """Start the job of a run; return its state instead if it is finished or if another process executes it."""
    count = run.gpus if submission.options.gpus is None else submission.options.gpus
    with _submission_lock(submission.results):
        (state,) = read_states([run])
        if not state.startable:
            return state
        executor = submission.executor(run.gpus, visible_gpus=list(range(place * count, (place + 1) * count)))
        token = _claim(run, "local")
        job = executor.submit(submission.command(run, token))
        _record(run, job.job_id, submission.log(job.job_id))
        return job


def _forget(run: Run, job: Any) -> None:
    """Delete job.json when the job has ended, unless another submission has replaced it."""
    if (read_job(run) or {}).get("id") == job.job_id:
        (run.folder / JOB).unlink(missing_ok=True)


def _reason(run: Run, log: Path) -> str:
    failure = run.folder / FAILURE
    return read_json(failure)["reason"] if failure.is_file() else f"it ended without a result; log of the job: {log}"


# ------------------------------------------------------------------------------------------------------ the job


def execute(run: Run, token: str) -> int:
    """Execute one run, in the process of its job.

    Args:
        run: the run.
        token: the token of the job.

    Returns:
        The exit status: 1 if a command failed.
    """
    if (read_job(run) or {}).get("token") != token:
        print(f"{run.name}: this job ends, because the run was submitted again by another one", flush=True)
        return 0
    # The job is one task, whose commands start their processes themselves. Otherwise Lightning would expect one task
    # of SLURM for each GPU.
    os.environ["SLURM_JOB_NAME"] = "interactive"
    outcome = Runner([run], jobs=1).go()
    return 1 if outcome.failed else 0
