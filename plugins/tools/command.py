"""What all commands share: a user's mistake is one sentence and exit status 2, and one process of a run speaks."""

import argparse
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from plugins.install import not_installed

_OURS = ("plugins", "solo_ext", "lightly_ext", "vissl_ext", "hydra_plugins")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of torchrun, of Lightning's children, of SLURM


class UserError(Exception):
    """Something the user can mend: an unknown name, a missing path, a wrong checkpoint. The message says how.

    Args:
        sentence: what is wrong. A data loader hands over its worker's whole traceback, of which it is the last line.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence.rpartition(f"{type(self).__name__}: ")[2].strip())


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are a UserError, without the usage that argparse prints before.

    Args:
        prog: ``python -m MODULE``; a console script puts its own name in its place.
        options: of argparse's parser.
    """

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog and with_command_name(prog, prog.removeprefix("python -m ")), **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words; the message about an unknown option names the nearest known one.

        Raises:
            UserError: the words are no command line of this parser.
        """
        found, left = self.parse_known_args(args, namespace)
        if left:
            near = nearest(left[0].partition("=")[0], self._option_string_actions)
            message = f"unrecognized arguments: {' '.join(left)}"
            if near:
                raise UserError(f"{message}; did you mean {near}?")
            self.error(message)
        return found

    def error(self, message: str) -> NoReturn:
        """Raise the UserError."""
        raise UserError(f"{message}; see --help")


def with_command_name(text: str, module: str) -> str:
    """Name a command as it was called.

    Args:
        text: of its help, which has ``python -m MODULE``.
        module: the command's.

    Returns:
        The text, with the name of the console script where that was called.
    """
    script = Path(sys.argv[0]).name
    return text.replace(f"python -m {module}", script) if script.startswith("ssl-") else text


def number(kind: type, *, zero: bool = False) -> Any:
    """A type for argparse: a number above 0.

    Args:
        kind: int or float.
        zero: whether 0 will do.
    """

    def positive(text: str) -> Any:
        value = kind(text)
        if not (value > 0 or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"must be {'at least' if zero else 'above'} 0, got {text}")
        return value

    positive.__name__ = kind.__name__  # argparse names it when the text is no number
    return positive


def nearest(name: Any, known: Iterable[Any], *, cutoff: float = 0.6) -> str | None:
    """Find the known name that is most similar to a misspelt one, for an error message.

    Args:
        name: the name that the user gave.
        known: the allowed names.
        cutoff: least similarity, between 0 and 1, as defined by :func:`difflib.get_close_matches`.

    Returns:
        The name, or None if none is similar enough.

    >>> nearest("isolos", ["byol", "isoloss"])
    'isoloss'
    """
    return next(iter(get_close_matches(str(name), map(str, known), 1, cutoff)), None)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a mistake of the user's into a one-line error and exit status 2.

    These are a UserError, a package that is not installed, a full disk, and a file that may not be read or written.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        if first_process():
            print(f"error: {not_installed(error.name)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (UserError, OSError) as error:
        sentence = str(error)
        if isinstance(error, PermissionError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}; change its permissions, or give another path"
        elif isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            sentence = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        if first_process():
            print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None


def first_process() -> bool:
    """Whether this is the process of a run that speaks."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def say(text: str) -> None:
    """Print a line, from the first process only, in one write: a process that is killed leaves no half line."""
    if first_process():
        print(f"{text}\n", end="", flush=True)  # with PYTHONUNBUFFERED, print writes its end separately
