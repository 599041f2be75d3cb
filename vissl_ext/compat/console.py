"""VISSL's log and Python's warnings in log.txt of the run's folder instead of on the console.

vissl/utils/logger.py:44 writes the log, several hundred lines before the first iteration, to ``sys.stdout``.
vissl/utils/distributed_launcher.py:162 passes one argument too many to ``logging``, which prints a traceback.
"""

import io
import logging
import warnings
from types import SimpleNamespace
from typing import Any


class _NullStream(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def hide_log() -> None:
    """Replace ``sys.stdout`` in VISSL's logger, and write warnings to the log."""
    from vissl.utils import logger

    def to_log(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        logging.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    logger.sys = SimpleNamespace(stdout=_NullStream())
    warnings.showwarning = to_log
    logging.raiseExceptions = False
