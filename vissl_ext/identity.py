"""What makes a run in a folder this run: another one is neither resumed there nor taken for it."""

from pathlib import Path
from typing import Any

from plugins.tools.command import UserError
from plugins.tools.records import difference, read_json, write_json
from vissl_ext.summary import plain

_FILE = "run.json"


def claim(folder: Path, engine: str, config: Any) -> None:
    """Write down what is run in a folder, unless it holds checkpoints of something else.

    The same run has the same engine, loss with its options, trunk, heads, optimiser and seed. Epochs, data, devices
    and logging may change; a folder that another launcher has begun says nothing and is taken as it is.

    Args:
        folder: of the run.
        engine: VISSL's.
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: the sentence says what differs.
    """
    loss = config.LOSS.name
    ours = plain(
        {
            "engine_name": engine,
            "config.LOSS.name": loss,
            f"config.LOSS.{loss}": config.LOSS.get(loss, {}),
            "config.MODEL.TRUNK": config.MODEL.TRUNK,
            "config.MODEL.HEAD": config.MODEL.HEAD,
            "config.OPTIMIZER.name": config.OPTIMIZER.name,
            "config.SEED_VALUE": config.SEED_VALUE,
        }
    )
    path = folder / _FILE
    if path.is_file() and any(folder.glob("model_*.torch")):
        theirs = read_json(path)
        for key, value in ours.items():
            if theirs.get(key, value) != value:
                name, there, here = difference(key, theirs[key], value)
                raise UserError(
                    f"{folder} holds a run with {name}={there}, this one has {here}; name another "
                    "config.CHECKPOINT.DIR, or delete that one"
                )
    write_json(path, ours)
