"""Submits a training to SLURM: ``python -m plugins.tools.slurm --nodes 2 --gpus-per-node 8 -- COMMAND``.

COMMAND are the arguments of ``python``, any that there are, such as ``-m solo_ext.main_pretrain …``. submitit starts it
once for each GPU, as ``srun`` does, so that Lightning finds its place in SLURM's variables; torch's own (RANK,
WORLD_SIZE, MASTER_ADDR, …) are set as well, for everything else. A job that reaches its time limit or is preempted is
put into the queue again and starts with the same command: the training must go on from its own checkpoints. For
solo_ext's commands ``devices``, ``num_nodes`` and ``auto_resume.enabled`` are filled in.

``--dry-run`` prints the sbatch script and submits nothing. ``--cluster local`` runs the processes on this machine.
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

from plugins.tools.command import Parser, UserError

REQUEUES = 1000
"""How often a job may reach its time limit."""
END_SECONDS = 20
"""How long a command may take to end when its job is over."""


class Command:
    """What each process of a job does: it runs ``python`` and ends as that does.

    Args:
        arguments: of ``python``.
        port: where the processes meet, if they are all on this machine; else it follows from the job's number.
    """

    def __init__(self, arguments: Sequence[str], port: int | None = None) -> None:
        self.arguments = list(arguments)
        self.port = port

    def __call__(self) -> None:
        """Run it.

        Raises:
            RuntimeError: its exit status is not 0.
        """
        environment = {**os.environ, **torch_variables()}
        if self.port is not None:
            environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))
        # the signal that announces the end of the job is for this process, not for the command
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
        """What submitit puts into the queue again: the same."""
        return DelayedSubmission(self)


def _ignore_announcement() -> None:
    signal.signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"), signal.SIG_IGN)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torch_variables() -> dict[str, str]:
    """torch.distributed's variables in the process of a job; none where it is the only one."""
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
    if here.cluster == "local":  # where torchrun would say so
        variables["TORCHELASTIC_RUN_ID"] = here.job_id
    return {name: str(value) for name, value in variables.items()}


# --------------------------------------------------------------------------------------------------- the command


def complete(arguments: Sequence[str], *, nodes: int, tasks_per_node: int) -> list[str]:
    """The command with what the framework must know of the job.

    Args:
        arguments: of ``python``.
        nodes, tasks_per_node: of the job.

    Raises:
        UserError: the command says something else than the job.
    """
    if len(arguments) < 2 or arguments[0] != "-m" or arguments[1] not in _SOLO:
        return list(arguments)
    added = []
    for key, value in (("devices", tasks_per_node), ("num_nodes", nodes)):
        given = _override(arguments, key)
        if given is None:
            added.append(f"++{key}={value}")
        elif _count(given) != value:
            raise UserError(f"the command has {key}={given}, the job has {value}")
    if _override(arguments, "auto_resume.enabled") is None:
        added.append("++auto_resume.enabled=True")
    return [*arguments, *added]


_SOLO = ("solo_ext.main_pretrain", "solo_ext.main_linear")


def _override(arguments: Sequence[str], key: str) -> str | None:
    """The last value that Hydra overrides give an entry."""
    found = [re.fullmatch(rf"\+{{0,2}}{re.escape(key)}=(.*)", argument) for argument in arguments]
    return next((match.group(1).strip("'\"") for match in reversed(found) if match), None)


def _count(devices: str) -> int | None:
    """How many devices ``4``, ``[0,1]`` or ``0,1`` are."""
    if devices.isdecimal():
        return int(devices)
    indexes = [part for part in devices.strip("[]").split(",") if part.strip()]
    return len(indexes) if "," in devices or devices.startswith("[") else None


# ------------------------------------------------------------------------------------------------------- the job


class _Sketch(SlurmExecutor):
    """Writes sbatch scripts on a machine that has no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "")


def make_executor(options: argparse.Namespace) -> SlurmExecutor | LocalExecutor:
    """submitit's executor for a command line.

    Raises:
        UserError: there is no SLURM here.
    """
    folder = options.folder.absolute()
    if options.cluster == "local":
        local = LocalExecutor(folder, max_num_timeout=REQUEUES)
        local.update_parameters(
            timeout_min=options.time, tasks_per_node=options.tasks_per_node, gpus_per_node=options.gpus_per_node
        )
        return local
    if options.dry_run:
        slurm = _Sketch(folder, max_num_timeout=REQUEUES)
    else:
        try:
            slurm = SlurmExecutor(folder, max_num_timeout=REQUEUES)
        except RuntimeError:
            raise UserError(
                "there is no srun here: submit from a node of the cluster, or use --cluster local"
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
    }
    slurm.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    return slurm


def submit(options: argparse.Namespace, command: Command) -> int:
    """Submit the job. Returns the exit status; a local job is waited for."""
    executor = make_executor(options)
    if isinstance(executor, _Sketch):
        print(executor.script())
        print(f"# each process: {shlex.join([sys.executable, *command.arguments])}")
        return 0
    job = executor.submit(command)
    log = job.paths.stdout
    if options.cluster == "slurm":
        print(f"job {job.job_id} is in the queue; its output goes to {log}")
        return 0
    failed = job.exception()
    print(log.read_text(errors="replace") if log.is_file() else "", end="")
    if failed is not None:
        print(f"error: the job failed; its output is in {log} and {job.paths.stderr}", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: it is wrong.
    """
    parser = Parser(
        prog="python -m plugins.tools.slurm",
        usage="%(prog)s [OPTIONS] -- ARGUMENTS OF PYTHON",
        description="Submit a training to SLURM, one process for each GPU.",
        epilog="example: %(prog)s --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu -- "
        "-m solo_ext.main_pretrain --config-path configs/solo/imagenet --config-name isoloss.yaml",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=_positive, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus-per-node", type=_whole, default=0, metavar="N", help="GPUs of each (default: 0)")
    add("--tasks-per-node", type=_positive, metavar="N", help="processes on each (default: one a GPU)")
    add("--cpus-per-task", type=_positive, metavar="N", help="cores of each process")
    add("--mem", metavar="SIZE", help="memory of each machine, such as 128GB")
    add(
        "--time", type=_minutes, default=24 * 60, metavar="TIME", help="limit: [D-]HH:MM:SS or minutes (default: 1 day)"
    )
    add("--partition", metavar="NAME", help="of the cluster")
    add("--sbatch", type=_pair, action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    add("--name", default="ssl-plugins", metavar="NAME", help="of the job (default: %(default)s)")
    add(
        "--folder",
        type=Path,
        default=Path("slurm"),
        metavar="FOLDER",
        help="for logs; on a shared disk (default: slurm)",
    )
    add("--cluster", choices=("slurm", "local"), default="slurm", help="local: processes on this machine, waited for")
    add("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    before = argv[: argv.index("--")] if "--" in argv else argv
    options = parser.parse_args(before)
    options.command = list(argv[len(before) + 1 :])
    if not options.command:
        raise UserError("there is no command; give the arguments of python after --")
    if options.tasks_per_node is None:
        options.tasks_per_node = max(options.gpus_per_node, 1)
    if options.cluster == "local" and options.nodes > 1:
        raise UserError("--cluster local has one machine, --nodes must be 1")
    if options.cluster == "local" and options.dry_run:
        raise UserError("--dry-run prints an sbatch script, --cluster local has none")
    return options


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _minutes(text: str) -> int:
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be [D-]HH:MM:SS or minutes, got {text!r}")
    days, hours, minutes, seconds, alone = (int(part or 0) for part in found.groups())
    total = alone or (days * 24 + hours) * 60 + minutes + (seconds > 0)
    if total < 1:
        raise argparse.ArgumentTypeError(f"must be at least a minute, got {text!r}")
    return total


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key.lstrip("-"), value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    try:
        options = parse(list(sys.argv[1:] if argv is None else argv))
        arguments = complete(options.command, nodes=options.nodes, tasks_per_node=options.tasks_per_node)
        return submit(options, Command(arguments, free_port() if options.cluster == "local" else None))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # the processes of the job unpickle the command: it must have a module that they can import
    from plugins.tools.slurm import main as imported

    sys.exit(imported())
