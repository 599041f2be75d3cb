"""Copying of images to a local disk before the training, ``DATA.TRAIN.COPY_TO_LOCAL_DISK``.

vissl/utils/io.py:271 returns one value instead of two if a folder has been copied before, and otherwise needs the
programs ``parallel`` and ``rsync``. Without COPY_DESTINATION_DIR it copies a folder to ``./None``.
vissl/data/dataset_catalog.py:138 confuses the copies of two folders with the same name, and
vissl/utils/distributed_launcher.py:57 deletes all of COPY_DESTINATION_DIR at the end, including other files.
"""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.folders import walk

_DONE = "copy_complete"
"""File by which VISSL recognises a folder that has been copied."""


def activate() -> None:
    """Copy each split to a separate folder; only these folders are deleted at the end."""
    from vissl.utils import distributed_launcher

    distributed_launcher._copy_to_local = copy_to_local


def copy_to_local(config: Any) -> None:
    """Copy the data of the splits with COPY_TO_LOCAL_DISK, and set the folders of the copies in the configuration.

    Args:
        config: VISSL's configuration, below ``config``; changed in place.

    Raises:
        UserError: the copies cannot be written, or two of them would have the same name.
    """
    from vissl.data.dataset_catalog import get_data_files

    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        if not data.COPY_TO_LOCAL_DISK:
            continue
        data.COPY_TO_LOCAL_DISK = False  # so that get_data_files returns the original paths
        files, labels = get_data_files(split, config.DATA)
        data.COPY_TO_LOCAL_DISK = True
        sources = [Path(path) for path in (*files, *labels) if path and isinstance(path, str)]
        sources = list(dict.fromkeys(sources))
        key = f"config.DATA.{split}.COPY_TO_LOCAL_DISK"
        if len({source.name for source in sources}) < len(sources):
            raise UserError(
                f"{key}: two of {', '.join(map(str, sources))} have the same name; rename one, or set it to false"
            )
        try:
            place = Path(data.COPY_DESTINATION_DIR or tempfile.mkdtemp(), split.lower())
            for source in sources:
                _copy(source, place)
        except OSError as error:
            raise UserError(f"{key}: {error.filename or place} cannot be copied: {error.strerror}") from None
        data.COPY_DESTINATION_DIR = str(place)
        print_on_rank_zero(f"the {split.lower()} data are copied to {place}")


def _copy(source: Path, place: Path) -> None:
    from vissl.utils.slurm import get_slurm_dir

    place.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, place / source.name)
        return
    if "SLURM_JOBID" in os.environ:
        place = Path(get_slurm_dir(str(place)))
    target = place / source.name
    if (target / _DONE).is_file():
        return
    pairs = []
    for folder, names in walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(parents=True, exist_ok=True)
        pairs += [(Path(folder, name), there / name) for name in names]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: shutil.copyfile(*pair), pairs))
    (target / _DONE).touch()
