"""Submit a training to SLURM: ``python -m plugins.tools.slurm --nodes 2 --gpus-per-node 8 -- COMMAND``.

COMMAND is any list of arguments of ``python``, such as ``-m solo_ext.main_pretrain …``. submitit starts one process per
GPU, as ``srun`` does. Lightning reads its rank from SLURM's variables. torch's variables (RANK, WORLD_SIZE,
MASTER_ADDR, …) are also set, for other programs. A job that reaches its time limit or is preempted is requeued with the
same command, so the training must resume from its checkpoints. For solo_ext's commands, ``devices``, ``num_nodes`` and
``auto_resume.enabled`` are added.

``--dry-run`` prints the sbatch script without submitting it. ``--cluster local`` runs the processes on this machine.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit import JobEnvironment, LocalExecutor, SlurmExecutor
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from plugins.tools.command import Parser, UserError, integer_from, key_value, minutes

REQUEUES = 1000
"""Maximal number of times that a job is requeued after it has reached its time limit."""
END_SECONDS = 20
"""Seconds between SIGTERM and SIGKILL at the end of a job."""


class Command:
    """The function that each process of a job executes: run ``python`` and fail if it fails.

    Args:
        arguments: arguments of ``python``.
        port: port of torch's rendezvous if all processes are on this machine; None derives it from the job id.
    """

    def __init__(self, arguments: Sequence[str], port: int | None = None) -> None:
        self.arguments = list(arguments)
        self.port = port

    def __call__(self) -> None:
        """Run the command.

        Raises:
            RuntimeError: the exit status is not 0.
        """
        environment = {**os.environ, **torch_variables()}
        if self.port is not None:
            environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))
        # submitit handles the signal that announces the time limit in this process; the command must ignore it
        process = subprocess.Popen([sys.executable, *self.arguments], env=environment, preexec_fn=_ignore_announcement)
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
        if status != 0:
            raise RuntimeError(f"python {shlex.join(self.arguments)} ended with status {status}")

    def checkpoint(self) -> DelayedSubmission:
        """Return the job that submitit requeues: the same command."""
        return DelayedSubmission(self)


def _ignore_announcement() -> None:
    signal.signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"), signal.SIG_IGN)


def free_port() -> int:
    """Return an unused port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torch_variables() -> dict[str, str]:
    """Return the environment variables of torch.distributed for this process of a job; none for a single process."""
    here = JobEnvironment()
    if here.num_tasks == 1:
        return {}
    found = TorchDistributedEnvironment()
    variables: dict[str, Any] = {
        "MASTER_ADDR": found.master_addr,
        "MASTER_PORT": found.master_port,
        "RANK": found.rank,
        "WORLD_SIZE": found.world_size,
        "LOCAL_RANK": found.local_rank,
        "LOCAL_WORLD_SIZE": found.local_world_size,
        "NODE_RANK": here.node,
        "GROUP_RANK": here.node,
    }
    if here.cluster == "local":  # as torchrun does
        variables["TORCHELASTIC_RUN_ID"] = here.job_id
    return {name: str(value) for name, value in variables.items()}


# --------------------------------------------------------------------------------------------------- the command


def complete(arguments: Sequence[str], *, nodes: int, tasks_per_node: int) -> list[str]:
    """Add the overrides for the number of devices and nodes, and for resuming, to a command of solo_ext.

    Args:
        arguments: arguments of ``python``; another module than solo_ext's commands is returned unchanged.
        nodes, tasks_per_node: number of machines, and of processes on each.

    Raises:
        UserError: the command sets another number of devices or nodes.
    """
    if len(arguments) < 2 or arguments[0] != "-m" or arguments[1] not in _SOLO:
        return list(arguments)
    added = []
    for key, value in (("devices", tasks_per_node), ("num_nodes", nodes)):
        given = _override(arguments, key)
        if given is None:
            added.append(f"++{key}={value}")
        elif _count(given) != value:
            raise UserError(
                f"the command sets {key}={given}, but the job has {key}={value}; remove {key} from the command"
            )
    if _override(arguments, "auto_resume.enabled") is None:
        added.append("++auto_resume.enabled=True")
    return [*arguments, *added]


_SOLO = ("solo_ext.main_pretrain", "solo_ext.main_linear")


def _override(arguments: Sequence[str], key: str) -> str | None:
    """Return the last value of an entry among the Hydra overrides, or None."""
    found = [re.fullmatch(rf"\+{{0,2}}{re.escape(key)}=(.*)", argument) for argument in arguments]
    return next((match.group(1).strip("'\"") for match in reversed(found) if match), None)


def _count(devices: str) -> int | None:
    """Return the number of devices in ``4``, ``[0,1]`` or ``0,1``; None for another form."""
    if devices.isdecimal():
        return int(devices)
    indexes = [part for part in devices.strip("[]").split(",") if part.strip()]
    return len(indexes) if "," in devices or devices.startswith("[") else None


# ------------------------------------------------------------------------------------------------------- the job


class Sketch(SlurmExecutor):
    """Executor that writes sbatch scripts on a machine without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self, jobs: int = 1) -> str:
        """Return the script of a job, or of an array of several jobs."""
        if jobs > 1:
            self.parameters["map_count"] = jobs
        return self._make_submission_file_text(self._submitit_command_str, "")


def make_executor(options: argparse.Namespace, **more: Any) -> SlurmExecutor | LocalExecutor:
    """Create submitit's executor for the options of the command line.

    Args:
        options: of :func:`parse`.
        more: further parameters of submitit's executor.

    Raises:
        UserError: SLURM is not installed.
    """
    folder = options.folder.absolute()
    if options.cluster == "local":
        local = LocalExecutor(folder, max_num_timeout=REQUEUES)
        local.update_parameters(
            timeout_min=options.time,
            tasks_per_node=options.tasks_per_node,
            gpus_per_node=options.gpus_per_node,
            **more,
        )
        return local
    if options.dry_run:
        slurm = Sketch(folder, max_num_timeout=REQUEUES)
    else:
        try:
            slurm = SlurmExecutor(folder, max_num_timeout=REQUEUES)
        except RuntimeError:
            raise UserError(
                "srun is not installed; submit from a node of the cluster, or use --cluster local"
            ) from None
    parameters: dict[str, Any] = {
        "job_name": options.name,
        "time": options.time,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": options.cpus_per_task,
        "mem": options.mem,
        "partition": options.partition,
        "additional_parameters": dict(options.sbatch) or None,
        **more,
    }
    slurm.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    return slurm


def submit(options: argparse.Namespace, command: Command) -> int:
    """Submit the job and return the exit status; with ``--cluster local``, wait until the job has ended."""
    executor = make_executor(options)
    if isinstance(executor, Sketch):
        print(executor.script())
        print(f"# each process: {shlex.join([sys.executable, *command.arguments])}")
        return 0
    job = executor.submit(command)
    log = job.paths.stdout
    if options.cluster == "slurm":
        print(f"job {job.job_id} is submitted; its output is written to {log}")
        return 0
    failed = job.exception()
    print(log.read_text(errors="replace") if log.is_file() else "", end="")
    if failed is not None:
        print(f"error: the job failed; its output is in {log} and {job.paths.stderr}", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: the command line is invalid.
    """
    parser = Parser(
        prog="python -m plugins.tools.slurm",
        usage="%(prog)s [OPTIONS] -- ARGUMENTS OF PYTHON",
        description="Submit a training to SLURM, one process per GPU.",
        epilog="example: %(prog)s --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu -- "
        "-m solo_ext.main_pretrain --config-path configs/solo/imagenet --config-name isoloss.yaml",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=integer_from(1), default=1, metavar="N", help="number of machines (default: 1)")
    add("--gpus-per-node", type=_whole, default=0, metavar="N", help="GPUs per machine (default: 0)")
    add("--tasks-per-node", type=integer_from(1), metavar="N", help="processes per machine (default: one per GPU)")
    add("--cpus-per-task", type=integer_from(1), metavar="N", help="CPU cores per process")
    add("--mem", metavar="SIZE", help="memory per machine, such as 128GB")
    add(
        "--time",
        type=minutes,
        default=24 * 60,
        metavar="TIME",
        help="time limit: [D-]HH:MM:SS or minutes (default: 1 day)",
    )
    add("--partition", metavar="NAME", help="partition of the cluster")
    add("--sbatch", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    add("--name", default="ssl-plugins", metavar="NAME", help="name of the job (default: %(default)s)")
    add(
        "--folder",
        type=Path,
        default=Path("slurm"),
        metavar="FOLDER",
        help="folder of the logs, on a shared file system (default: slurm)",
    )
    add("--cluster", choices=("slurm", "local"), default="slurm", help="local: run on this machine and wait")
    add("--dry-run", action="store_true", help="print the sbatch script and exit")
    before = argv[: argv.index("--")] if "--" in argv else argv
    options = parser.parse_args(before)
    options.command = list(argv[len(before) + 1 :])
    if not options.command:
        raise UserError("there is no command; give the arguments of python after --")
    if options.tasks_per_node is None:
        options.tasks_per_node = max(options.gpus_per_node, 1)
    if options.cluster == "local" and options.nodes > 1:
        raise UserError(f"--cluster local runs on one machine: --nodes must be 1, got {options.nodes}")
    if options.cluster == "local" and options.dry_run:
        raise UserError("--dry-run prints an sbatch script, which --cluster local does not use; give one of them")
    return options


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    try:
        options = parse(list(sys.argv[1:] if argv is None else argv))
        arguments = complete(options.command, nodes=options.nodes, tasks_per_node=options.tasks_per_node)
        return submit(options, Command(arguments, free_port() if options.cluster == "local" else None))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # the processes of the job unpickle Command, so its module must not be __main__
    from plugins.tools.slurm import main as imported

    sys.exit(imported())
