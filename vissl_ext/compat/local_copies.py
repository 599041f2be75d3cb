"""Images that are copied to a local disk before the training, ``DATA.TRAIN.COPY_TO_LOCAL_DISK``.

vissl/utils/io.py:271 returns one value where two are expected if a folder has been copied before, otherwise it needs
the programs ``parallel`` and ``rsync``; without COPY_DESTINATION_DIR a folder goes to ``./None``.
vissl/data/dataset_catalog.py:138 takes the copies of two folders of one name for the same, and
vissl/utils/distributed_launcher.py:57 deletes the whole COPY_DESTINATION_DIR at the end, with what else is in it.
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
"""The file that VISSL looks for in a folder that has been copied."""


def activate() -> None:
    """Copy with this, to a folder of each split's own, which alone is deleted at the end."""
    from vissl.utils import distributed_launcher

    distributed_launcher._copy_to_local = copy_to_local


def copy_to_local(config: Any) -> None:
    """Copy the data of the splits that ask for it, and write the place into the configuration.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: the copies cannot be written, or two of them would have one name.
    """
    from vissl.data.dataset_catalog import get_data_files

    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        if not data.COPY_TO_LOCAL_DISK:
            continue
        data.COPY_TO_LOCAL_DISK = False  # the paths of the originals
        files, labels = get_data_files(split, config.DATA)
        data.COPY_TO_LOCAL_DISK = True
        sources = [Path(path) for path in (*files, *labels) if path and isinstance(path, str)]
        sources = list(dict.fromkeys(sources))
        key = f"config.DATA.{split}.COPY_TO_LOCAL_DISK"
        if len({source.name for source in sources}) < len(sources):
            raise UserError(
                f"{key}: two of {', '.join(map(str, sources))} have one name; rename one, or set it to false"
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
