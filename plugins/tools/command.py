"""Helpers of all commands: one-line errors with exit status 2, option parsing, and output from rank 0 only."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from plugins.install import not_installed
from plugins.spelling import did_you_mean, nearest

__all__ = [
    "Parser",
    "UserError",
    "did_you_mean",
    "exit_on_user_error",
    "first_process",
    "home",
    "integer_from",
    "key_value",
    "minutes",
    "nearest",
    "positive_number",
    "print_on_rank_zero",
    "with_command_name",
]

_OURS = ("plugins", "solo_ext", "lightly_ext", "vissl_ext", "hydra_plugins")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # set by torchrun, by Lightning for its child processes, by SLURM


class UserError(Exception):
    """An error that the user can correct: an unknown name, a missing path, a wrong checkpoint.

    Args:
        sentence: what was given, what is allowed and what to do. If an error is raised in a worker of a data loader,
            torch passes the whole traceback as the message; only its last line is kept.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence.rpartition(f"{type(self).__name__}: ")[2].strip())


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError for invalid arguments, without argparse's usage lines.

    Args:
        prog: ``python -m MODULE``; replaced by the name of the console script if the command was started by one.
        options: further arguments of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog and with_command_name(prog, prog.removeprefix("python -m ")), **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; the error for an unknown option names the most similar known option.

        A ``~`` at the start of a path is the home folder. The shell replaces it in ``--out ~/x`` but not in
        ``--out=~/x``.

        Raises:
            UserError: the arguments are invalid.
        """
        found, left = self.parse_known_args(args, namespace)
        if left:
            near = nearest(left[0].partition("=")[0], self._option_string_actions)
            message = f"unrecognized arguments: {' '.join(left)}"
            if near:
                raise UserError(f"{message}; did you mean {near}?")
            self.error(message)
        for name, value in vars(found).items():
            if isinstance(value, Path):
                setattr(found, name, home(value))
            elif isinstance(value, list) and any(isinstance(one, Path) for one in value):
                setattr(found, name, [home(one) if isinstance(one, Path) else one for one in value])
        return found

    def error(self, message: str) -> NoReturn:
        """Raise the UserError."""
        raise UserError(f"{message}; see --help")


def home(path: Path) -> Path:
    """Replace a ``~`` at the start of a path by the home folder; leave it if there is no such user.

    >>> home(Path("~")) == Path.home(), home(Path("a/~b"))
    (True, PosixPath('a/~b'))
    """
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def with_command_name(text: str, module: str) -> str:
    """Replace ``python -m MODULE`` in a help text by the name of the console script that was started, if any.

    Args:
        text: the help text, which contains ``python -m MODULE``.
        module: the module of the command.

    Returns:
        The text, unchanged if the command was started by ``python -m``.
    """
    script = Path(sys.argv[0]).name
    return text.replace(f"python -m {module}", script) if script.startswith("ssl-") else text


def positive_number(kind: type, *, zero: bool = False) -> Any:
    """Return a type for argparse that accepts numbers above 0.

    Args:
        kind: int or float.
        zero: whether 0 is allowed too.
    """

    def positive(text: str) -> Any:
        value = kind(text)
        if not (value > 0 or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"must be {'at least' if zero else 'above'} 0, got {text}")
        return value

    positive.__name__ = kind.__name__  # argparse prints this name if the text is not a number
    return positive


def integer_from(least: int) -> Callable[[str], int]:
    """Return a type for argparse that accepts integers of at least ``least``, which is 0 or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer, at least {least}, got {text!r}")
        return int(text)

    return parse


def minutes(text: str) -> int:
    """Convert the text of a time limit to minutes, rounded up; a type for argparse.

    >>> minutes("90"), minutes("2:30:00"), minutes("1-00:00:01")
    (90, 150, 1441)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be [D-]HH:MM:SS or minutes, got {text!r}")
    days, hours, whole, seconds, alone = (int(part or 0) for part in found.groups())
    total = alone or (days * 24 + hours) * 60 + whole + (seconds > 0)
    if total < 1:
        raise argparse.ArgumentTypeError(f"must be at least a minute, got {text!r}")
    return total


def key_value(text: str) -> tuple[str, str]:
    """Split KEY=VALUE, with or without dashes before KEY; a type for argparse.

    >>> key_value("--qos=long")
    ('qos', 'long')
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key.lstrip("-"), value


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a one-line error and exit with status 2 if the block raises an error that the user can correct.

    Such errors are a UserError, a package that is not installed, a full disk, missing permissions for a file, and a
    training whose numbers are NaN or inf (FloatingPointError).
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        if first_process():
            print(f"error: {not_installed(error.name)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (UserError, OSError, FloatingPointError) as error:
        sentence = str(error)
        if isinstance(error, FloatingPointError):
            sentence = f"training diverged: {sentence}"
        elif isinstance(error, PermissionError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}; change its permissions, or give another path"
        elif isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            sentence = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        if first_process():
            print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def first_process() -> bool:
    """Return whether this is rank 0, the only process of a run that prints."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def print_on_rank_zero(text: str) -> None:
    """Print a line on rank 0, in a single write, so that a killed process never leaves part of a line."""
    if first_process():
        print(f"{text}\n", end="", flush=True)  # with PYTHONUNBUFFERED, print writes the newline separately
