"""What a command prints: once, whatever the number of its processes."""

import os

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of torchrun, of Lightning's children, of SLURM


def first_process() -> bool:
    """Whether this is the process of a run that speaks."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def say(text: str) -> None:
    """Print a line, from the first process only."""
    if first_process():
        print(text, flush=True)
