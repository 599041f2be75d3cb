"""A user's mistake is one sentence and exit status 2; a traceback is for ours."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from solo_ext.console import first_process


class UserError(Exception):
    """Something the user can mend: an unknown name, a missing path, a wrong checkpoint. The message says how.

    Args:
        sentence: what is wrong. A data loader hands over its worker's whole traceback, of which it is the last line.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence.rpartition(f"{type(self).__name__}: ")[2].strip())


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError into its sentence on standard error and exit status 2."""
    try:
        yield
    except UserError as error:
        if first_process():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
