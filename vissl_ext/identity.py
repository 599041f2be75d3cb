"""What makes a run in a folder this run: another one is neither resumed there nor taken for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugins.tools.command import UserError
from plugins.tools.records import difference, read_json, write_json
from vissl_ext.compat.checkpoints import checkpoints
from vissl_ext.summary import plain

_FILE = "run.json"
_EPOCHS = "config.OPTIMIZER.num_epochs"
_BATCH = "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA of all processes"
_APART = {"TRUNK", "HEAD"}
"""Entries of MODEL with a key of their own."""
_OF_THE_MACHINE = {
    *("SYNC_BN_CONFIG", "AMP_PARAMS", "CUDA_CACHE", "ACTIVATION_CHECKPOINTING", "SHARDED_DDP_SETUP", "FSDP_CONFIG"),
    *("BATCHSIZE_PER_REPLICA", "MMAP_MODE", "COPY_TO_LOCAL_DISK", "COPY_DESTINATION_DIR"),
}
"""Entries of MODEL and DATA.TRAIN that say how a machine trains, or that are counted otherwise."""
_DERIVED = {"world_size", "local_queue_length", "BATCHSIZE_PER_REPLICA", "output_dir"}
"""Entries of a loss that VISSL overwrites (vissl/utils/hydra_config.py:345): with the number of processes, the batch of
a process, and the run's folder."""


def identity(engine: str, config: Any, paths: Mapping[str, list[str]] | None = None) -> dict[str, Any]:
    """What decides on the images, the objective and the optimisation of a run, and the number of its epochs.

    Not in it: devices, precision and number of processes, as long as their batches are as large together; logging,
    checkpoints, tests' data and meters.

    Args:
        engine: VISSL's.
        config: VISSL's configuration, below ``config``.
        paths: DATA_PATHS as the user gives them, by split; a folder may have become a list of its images.

    Returns:
        Key → value, as JSON holds them.
    """
    loss, data = config.LOSS.name, config.DATA.TRAIN
    images = {key: value for key, value in data.items() if key not in _OF_THE_MACHINE}
    if len(data.DATA_PATHS):
        given = (paths or {}).get("TRAIN", data.DATA_PATHS)
        images["DATA_PATHS"] = [str(Path(str(path)).expanduser().absolute()) for path in given]
        images["DATASET_NAMES"] = [name for name in data.DATASET_NAMES if not str(name).startswith("train:")]
        if len(data.LABEL_SOURCES):
            images["LABEL_SOURCES"] = list(data.LABEL_SOURCES)
    processes = config.DISTRIBUTED.NUM_NODES * config.DISTRIBUTED.NUM_PROC_PER_NODE
    found: dict[str, Any] = plain(
        {
            "engine_name": engine,
            "config.LOSS.name": loss,
            f"config.LOSS.{loss}": _without_derived(config.LOSS.get(loss, {})),
            "config.MODEL.TRUNK": config.MODEL.TRUNK,
            "config.MODEL.HEAD": config.MODEL.HEAD,
            "config.MODEL": {k: v for k, v in config.MODEL.items() if k not in _APART | _OF_THE_MACHINE},
            "config.DATA.TRAIN": images,
            _BATCH: data.BATCHSIZE_PER_REPLICA * processes,
            "config.OPTIMIZER.name": config.OPTIMIZER.name,
            "config.OPTIMIZER": {k: v for k, v in config.OPTIMIZER.items() if k != "num_epochs"},
            "config.SEED_VALUE": config.SEED_VALUE,
            "config.TRAINER": config.TRAINER,
            **{f"config.{key}": config[key] for key in ("TEST_ONLY", "TEST_MODEL", "TEST_EVERY_NUM_EPOCH")},
            _EPOCHS: config.OPTIMIZER.num_epochs,
        }
    )
    return found


def _without_derived(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_derived(entry) for key, entry in value.items() if key not in _DERIVED}
    return value


def check_same(folder: Path, ours: Mapping[str, Any]) -> int | None:
    """Refuse to go on with a run that is another one.

    A folder that another launcher has begun says nothing and is taken as it is; a run of a release that wrote down less
    is compared in that.

    Args:
        folder: of the run.
        ours: of :func:`identity`.

    Returns:
        The number of epochs with which the run was started before, where it was another number.

    Raises:
        UserError: the sentence says what differs.
    """
    path = folder / _FILE
    if not path.is_file() or not checkpoints(folder):
        return None
    try:
        theirs = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; name another config.CHECKPOINT.DIR") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{path} was not written by this launcher; name another config.CHECKPOINT.DIR")
    theirs = _without_derived(theirs)  # earlier releases wrote them down
    for key, value in ours.items():
        if key != _EPOCHS and theirs.get(key, value) != value:
            name, there, here = difference(key, theirs[key], value)
            raise UserError(
                f"{folder} holds a run with {name}={there}, this one has {here}; give {name}={there} to go on with "
                "it, or name another config.CHECKPOINT.DIR"
            )
    before = theirs.get(_EPOCHS)
    return before if before != ours[_EPOCHS] else None


def claim(folder: Path, ours: Mapping[str, Any]) -> None:
    """Write down what is run in a folder.

    Args:
        folder: of the run.
        ours: of :func:`identity`.
    """
    write_json(folder / _FILE, ours)
