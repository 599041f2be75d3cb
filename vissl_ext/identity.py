"""Record of the settings of a run in its folder, so that only a run with the same settings is resumed there."""

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
_SEPARATE = {"TRUNK", "HEAD"}
"""Keys of MODEL that are recorded separately."""
_EXCLUDED = {
    *("SYNC_BN_CONFIG", "AMP_PARAMS", "CUDA_CACHE", "ACTIVATION_CHECKPOINTING", "SHARDED_DDP_SETUP", "FSDP_CONFIG"),
    *("BATCHSIZE_PER_REPLICA", "MMAP_MODE", "COPY_TO_LOCAL_DISK", "COPY_DESTINATION_DIR"),
}
"""Keys of MODEL and DATA.TRAIN that depend on the machine, or that are part of the joined batch size."""
_DERIVED = {"world_size", "local_queue_length", "BATCHSIZE_PER_REPLICA", "output_dir"}
"""Options of losses that VISSL overwrites (vissl/utils/hydra_config.py:345) by the number of processes, the batch size
of a process, and the run's folder."""


def run_settings(engine: str, config: Any, paths: Mapping[str, list[str]] | None = None) -> dict[str, Any]:
    """Return the settings of a run that determine its images, objective and optimisation, and its number of epochs.

    Devices, precision, the number of processes at equal joined batch size, logging, checkpoints, test data and meters
    are not included.

    Args:
        engine: name of the engine.
        config: VISSL's configuration, below ``config``.
        paths: split → DATA_PATHS as given by the user, before folders are replaced by lists of images.

    Returns:
        Key → value, as JSON represents them.
    """
    loss, data = config.LOSS.name, config.DATA.TRAIN
    images = {key: value for key, value in data.items() if key not in _EXCLUDED}
    if len(data.DATA_PATHS):
        original = (paths or {}).get("TRAIN", data.DATA_PATHS)
        images["DATA_PATHS"] = [str(Path(str(path)).expanduser().absolute()) for path in original]
        images["DATASET_NAMES"] = [name for name in data.DATASET_NAMES if not str(name).startswith("train:")]
        if len(data.LABEL_SOURCES):
            images["LABEL_SOURCES"] = list(data.LABEL_SOURCES)
    processes = config.DISTRIBUTED.NUM_NODES * config.DISTRIBUTED.NUM_PROC_PER_NODE
    settings: dict[str, Any] = plain(
        {
            "engine_name": engine,
            "config.LOSS.name": loss,
            f"config.LOSS.{loss}": _without_derived(config.LOSS.get(loss, {})),
            "config.MODEL.TRUNK": config.MODEL.TRUNK,
            "config.MODEL.HEAD": config.MODEL.HEAD,
            "config.MODEL": {k: v for k, v in config.MODEL.items() if k not in _SEPARATE | _EXCLUDED},
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
    return settings


def _without_derived(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_derived(entry) for key, entry in value.items() if key not in _DERIVED}
    return value


def check_same(folder: Path, current: Mapping[str, Any]) -> int | None:
    """Check that the run in a folder, if any, has the same settings.

    A folder of another launcher has no record and is accepted. Settings that an earlier release did not record are not
    compared.

    Args:
        folder: folder of the run.
        current: result of :func:`run_settings`.

    Returns:
        The recorded number of epochs if it differs, else None.

    Raises:
        UserError: a setting differs, or the record cannot be read.
    """
    path = folder / _FILE
    if not path.is_file() or not checkpoints(folder):
        return None
    try:
        recorded = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; set another config.CHECKPOINT.DIR") from None
    if not isinstance(recorded, dict):
        raise UserError(f"{path} was not written by this launcher; set another config.CHECKPOINT.DIR")
    recorded = _without_derived(recorded)  # earlier releases recorded them
    for key, value in current.items():
        if key != _EPOCHS and recorded.get(key, value) != value:
            name, there, here = difference(key, recorded[key], value)
            raise UserError(
                f"{folder} contains a run with {name}={there}, this one has {here}; set {name}={there} to continue it, "
                "or set another config.CHECKPOINT.DIR"
            )
    before = recorded.get(_EPOCHS)
    return before if before != current[_EPOCHS] else None


def write_settings(folder: Path, current: Mapping[str, Any]) -> None:
    """Write the record of a run.

    Args:
        folder: folder of the run.
        current: result of :func:`run_settings`.
    """
    write_json(folder / _FILE, current)
