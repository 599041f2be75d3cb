"""States of the runs of a suite: finished, active on this machine, or in the queue of a cluster.

Everything is read from the folders of the runs, and from ``squeue`` and ``sacct`` if runs were submitted to SLURM:

===============  ===================================================================================================
file of a run    meaning
===============  ===================================================================================================
``result.json``  the run is finished
``.run-lock``    locked by the process that executes the run
``job.json``     the job that executes the run: cluster, number, token (see :mod:`plugins.experiments.cluster`)
``failed.json``  why the last execution failed
``steps.json``   commands that have started, and the durations of the completed ones
===============  ===================================================================================================
"""

import os
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from plugins.experiments.results import MISSING, markdown_table
from plugins.experiments.suites import Run
from plugins.experiments.suites.runner import FAILURE, RUN_LOCK, format_scores
from plugins.spelling import counted
from plugins.tools.process import holder
from plugins.tools.records import read_json

JOB = "job.json"
"""The file in a run's folder that names its job."""
SECONDS = 60
"""Time limit of squeue and sacct."""
_STARTED = ("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING")
"""States of SLURM in which a job has started. In the others of squeue it waits."""


@dataclass(frozen=True)
class State:
    """State of a run.

    Args:
        run: the run.
        name: ``to do``, ``queued``, ``running``, ``done``, ``failed``, ``interrupted``, or ``submitted`` if the queue
            of the cluster cannot be asked.
        note: job, active command, scores, or the reason of a failure and the path of its log.
        job: content of job.json if the job is in the queue or active; else None.
    """

    run: Run
    name: str
    note: str = ""
    job: dict[str, Any] | None = None

    @property
    def startable(self) -> bool:
        """Whether the run may be started or submitted."""
        return self.name in ("to do", "failed", "interrupted")


@dataclass(frozen=True)
class Queue:
    """Answers of SLURM.

    Args:
        active: job number → state and reason of the jobs that wait or run; None if squeue failed.
        ended: job number → state of the ended jobs that sacct knows.
        error: why squeue failed.
    """

    active: dict[str, tuple[str, str]] | None
    ended: dict[str, str]
    error: str = ""


def read_states(runs: Sequence[Run]) -> list[State]:
    """Read the states of runs. SLURM is asked once for all of them, if unfinished runs were submitted to it."""
    jobs = {run.name: job for run in runs if not run.result.is_file() and (job := read_job(run)) is not None}
    queue = ask_slurm([job["id"] for job in jobs.values() if job["cluster"] == "slurm" and job["id"]])
    return [_state(run, jobs.get(run.name), queue) for run in runs]


def read_job(run: Run) -> dict[str, Any] | None:
    """Read job.json of a run; None if the run was not submitted."""
    try:
        return read_json(run.folder / JOB)
    except (OSError, ValueError):
        return None


def ask_slurm(numbers: Iterable[str]) -> Queue:
    """Ask squeue for jobs and, if it does not list all of them, sacct; without jobs, nothing is asked.

    sacct needs SLURM's accounting, which not every cluster has. It only tells why a job has ended.
    """
    wanted = sorted(set(numbers))
    if not wanted:
        return Queue({}, {})
    mains = ",".join(sorted({number.partition("_")[0] for number in wanted}))
    try:
        asked = _call("squeue", "--noheader", "--array", f"--jobs={mains}", "--format=%i|%T|%r")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Queue(None, {}, f"squeue: {getattr(error, 'strerror', None) or error}")
    # squeue also fails if it has already forgotten all jobs
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        return Queue(
            None, {}, (asked.stderr.strip() or f"squeue ended with status {asked.returncode}").splitlines()[-1]
        )
    rows = [line.strip().split("|") for line in asked.stdout.splitlines() if line.count("|") == 2]
    active = {number: (state, reason) for number, state, reason in rows}
    ended: dict[str, str] = {}
    if any(number not in active for number in wanted):
        try:
            asked = _call(
                "sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={mains}", "--format=JobID,State"
            )
        except (OSError, subprocess.TimeoutExpired):
            return Queue(active, ended)
        ended = dict(line.strip().split("|") for line in asked.stdout.splitlines() if line.count("|") == 1)
    return Queue(active, ended)


def _call(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def _state(run: Run, job: dict[str, Any] | None, queue: Queue) -> State:
    if run.result.is_file():
        return State(run, "done", format_scores(read_json(run.result)))
    number = f"job {job['id']}" if job is not None and job["id"] else ""
    process = holder(run.folder, RUN_LOCK)
    if process is not None:
        return State(run, "running", ", ".join(filter(None, [_step(run), number or process])), job)
    if job is not None and job["id"] and job["cluster"] == "slurm":
        if queue.active is None:
            return State(run, "submitted", f"{number}; {queue.error}", job)
        if job["id"] in queue.active:
            state, reason = queue.active[job["id"]]
            name = "running" if state in _STARTED else "queued"
            details = ", ".join(filter(_telling, [state.lower(), reason]))
            return State(run, name, f"{number} ({details})" if details else number, job)
    if job is not None and job["cluster"] == "local" and job["host"] == socket.gethostname() and _alive(job["id"]):
        return State(run, "running", number, job)  # the job has not locked the folder yet
    if (run.folder / FAILURE).is_file():
        return State(run, "failed", f"{read_json(run.folder / FAILURE)['reason']}; log: {run.log}")
    if job is not None and job["id"]:
        why = queue.ended.get(job["id"], "").lower() or "ended without a result"
        return State(run, "failed", f"{number} {why}; log: {run.log if run.log.is_file() else job['log']}")
    return State(run, "interrupted" if (run.folder / "steps.json").is_file() else "to do")


def _telling(word: str) -> bool:
    return word not in ("", "None", "pending", "running")


def _alive(number: str | None) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(int(number or ""), 0)
    except PermissionError:
        return True  # it belongs to another user
    except (OSError, ValueError):
        return False
    return True


def _step(run: Run) -> str:
    """Return the name of the active command."""
    try:
        steps = read_json(run.folder / "steps.json")
    except (OSError, ValueError):
        return "starting"
    return next((name for name, step in steps.items() if step["seconds"] is None), "")


def format_table(states: Sequence[State]) -> str:
    """Format the states as a table, with a line of totals below it."""
    head = ["run", "state", "epoch", "loss", "accuracy (%)", "note"]
    body = []
    for state in states:
        progress = state.run.progress(state.run.folder)
        known = progress is not None
        done = state.name == "done"
        online = f"online {progress.accuracy:.1f}" if known and progress.accuracy is not None else MISSING
        body.append(
            [
                state.run.name,
                state.name,
                f"{progress.epoch}/{progress.epochs}" if known else MISSING,
                f"{progress.loss:.4g}" if known and progress.loss is not None else MISSING,
                (state.note or MISSING) if done else online,
                "" if done else state.note,
            ]
        )
    names = [state.name for state in states]
    totals = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return "\n".join([*markdown_table(head, body, words=len(head)), "", f"{counted(len(states), 'run')}: {totals}"])
