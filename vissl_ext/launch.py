"""python -m vissl_ext.launch config=NAME [OVERRIDES]: VISSL's tools/run_distributed_engines.py with our methods."""

import multiprocessing
import os
import signal
import sys
import zipfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plugins.install import not_installed
from plugins.tools.command import UserError, exit_on_user_error, print_on_rank_zero, with_command_name
from plugins.tools.process import hide_dropped

USAGE = """usage: python -m vissl_ext.launch config=NAME [OVERRIDE ...] [--config-dir FOLDER]

Trains or evaluates with VISSL 0.1.6. Takes what VISSL's tools/run_distributed_engines.py takes: a configuration by its
name below VISSL's configs/config, and overrides of single entries in Hydra's language.

  config=NAME           VISSL's own (pretrain/simclr/simclr_8node_resnet), ours (pretrain/isoloss/...), or one of
                        ./configs/config or FOLDER/config; --list names them all
  config.KEY=VALUE      overrides an entry, +config.KEY=VALUE adds one
  +config/GROUP=NAME    lays another file over it
  engine_name=NAME      train (default), extract_features, ...
  node_id=NUMBER        of this machine, if there are several
  --config-dir FOLDER   a folder of your own that holds a folder 'config'; may be given several times
  --list [TEXT]         name the configurations, those with TEXT in their name

Images: config.DATA.TRAIN.DATA_PATHS=[FOLDER] is enough, with a folder for each class or without.
Without a GPU the settings that need one are turned off, and a line says which. The run's folder, config.CHECKPOINT.DIR,
gets checkpoints, log.txt, metrics.json and train_config.yaml; a run that was killed goes on from its last checkpoint,
and one that is finished with a larger config.OPTIMIZER.num_epochs.

examples:
  python -m vissl_ext.launch config=pretrain/simclr/simclr_8node_resnet \\
      config.DATA.TRAIN.DATA_PATHS=[/data/imagenet/train] config.CHECKPOINT.DIR=runs/simclr \\
      config.DISTRIBUTED.NUM_NODES=1 config.DISTRIBUTED.RUN_ID=auto \\
      config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch
  python -m vissl_ext.launch config=pretrain/moco/moco_1node_resnet --config-dir ~/my_vissl/configs \\
      config.DATA.TRAIN.DATA_PATHS=[~/photos] config.OPTIMIZER.num_epochs=20
  python -m vissl_ext.launch --list swav
"""


def main(argv: list[str]) -> None:
    """Do what a command line says.

    Args:
        argv: without the program's name.

    Raises:
        UserError: something in it is wrong; nothing has been started.
    """
    if find_spec("vissl") is None:
        raise UserError(not_installed("vissl"))
    overrides, folders = _options(argv)
    if "--list" in overrides:
        from vissl_ext.compose import config_names

        places = [Path(folder).expanduser() for folder in folders]
        words = [word for word in overrides if word != "--list"]
        missing = next((place for place in places if not place.is_dir()), None)
        if missing is not None:
            raise UserError(f"--config-dir is no folder: {missing}")
        names = [name for name in config_names(places) if all(word in name for word in words)]
        if not names:
            raise UserError(f"no configuration has {' and '.join(words)} in its name")
        print("\n".join(names))
        return
    unknown = next((word for word in overrides if word.startswith("-")), None)
    if unknown:
        raise UserError(f"unknown option {unknown}; see --help")
    args, config = prepare(overrides, folders)
    run(args, config)


def _options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The overrides and the folders of ``--config-dir``."""
    overrides, folders, words = [], [], iter(argv)
    for word in words:
        if word == "--config-dir" or word.startswith("--config-dir="):
            folder = word.partition("=")[2] or next(words, None)
            if not folder:
                raise UserError("--config-dir must name a folder")
            folders.append(folder)
        else:
            overrides.append(word)
    return overrides, folders


def prepare(overrides: list[str], folders: list[str]) -> tuple[Any, Any]:
    """Compose a configuration, check it and complete it; begins the run's folder.

    Args:
        overrides: ``config=NAME`` and Hydra's overrides.
        folders: of ``--config-dir``.

    Returns:
        VISSL's whole configuration, and what is below ``config``.

    Raises:
        UserError: something in it is wrong; nothing has been started, and no file written.
    """
    from classy_vision.optim import build_optimizer_schedulers
    from omegaconf import OmegaConf
    from vissl.utils.checkpoint import is_training_finished
    from vissl.utils.hydra_config import convert_to_attrdict, save_attrdict_to_disk

    from vissl_ext import catalog, ranks
    from vissl_ext.checks import check, check_outputs, check_sections
    from vissl_ext.compat.checkpoints import reopen, set_aside, torn_name
    from vissl_ext.compat.folder_images import forget_unreadable
    from vissl_ext.compose import compose
    from vissl_ext.defaults import adapt, without_slurm
    from vissl_ext.identity import check_same, claim, identity
    from vissl_ext.locks import lock

    ranks.hide_warnings()
    cfg, given = compose(overrides, folders)
    check_sections(cfg)
    changed, slurm = adapt(cfg, given), without_slurm(cfg.config, given)
    # a rank, a data loader's worker and a link may have another working directory
    if cfg.config.CHECKPOINT.DIR in (None, ""):
        raise UserError(f"config.CHECKPOINT.DIR must name a folder, got {cfg.config.CHECKPOINT.DIR!r}")
    cfg.config.CHECKPOINT.DIR = str(Path(str(cfg.config.CHECKPOINT.DIR)).expanduser().absolute())
    weights = cfg.config.MODEL.WEIGHTS_INIT
    if str(weights.PARAMS_FILE or "").startswith("~"):
        weights.PARAMS_FILE = str(Path(weights.PARAMS_FILE).expanduser())
    given_paths = {split: cfg.config.DATA[split].DATA_PATHS for split in ("TRAIN", "TEST")}
    paths = {split: list(those) for split, those in given_paths.items() if OmegaConf.is_list(those)}
    lists = catalog.complete(cfg.config, given, same_classes=cfg.engine_name == "train")
    check(cfg, given)
    if cfg.engine_name == "train":
        check_outputs(cfg.config)
    _check_weights(weights)
    try:
        args, config = convert_to_attrdict(cfg, dump_config=False)
        build_optimizer_schedulers(deepcopy(config.OPTIMIZER))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"VISSL refuses the configuration: {str(error).strip().splitlines()[0]}") from None
    folder = Path(config.CHECKPOINT.DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, args.node_id)
        ours = identity(cfg.engine_name, config, paths)
        before = check_same(folder, ours)
        for name in set_aside(folder):
            print_on_rank_zero(
                f"{name} cannot be read and is skipped: it is kept as {torn_name(name)}, and the one before is used"
            )
        if is_training_finished(config, checkpoint_folder=str(folder)):
            return args, config  # nothing will be trained: what is there stays as it is
        if config.CHECKPOINT.AUTO_RESUME and not config.CHECKPOINT.OVERWRITE_EXISTING:
            before = reopen(folder) or before
            if before is not None:
                print_on_rank_zero(
                    f"config.OPTIMIZER.num_epochs was {before} and is {config.OPTIMIZER.num_epochs} now: learning rate "
                    "and other schedules follow the new length from here on"
                )
        claim(folder, ours)
        forget_unreadable(folder)
        save_attrdict_to_disk(_plain(config))
        catalog.write_lists(lists)
    except OSError as error:
        raise UserError(f"config.CHECKPOINT.DIR cannot be written to: {error}") from None
    if slurm:
        print_on_rank_zero(slurm)
    if changed:
        print_on_rank_zero(f"on the CPU: {', '.join(changed)}")
    return args, config


def _check_weights(weights: Any) -> None:
    """Check that the file of weights is there, is whole, and holds weights and no code.

    Args:
        weights: the section MODEL.WEIGHTS_INIT.

    Raises:
        UserError: torch would not read it, or it holds something else.
    """
    import torch

    from vissl_ext.compat.missing_weights import check_content
    from vissl_ext.compat.saved_types import unknown_types

    path, key = weights.PARAMS_FILE, "config.MODEL.WEIGHTS_INIT.PARAMS_FILE"
    if not path or "://" in path:
        return
    if not Path(path).is_file():
        what = "is no file" if path != "specify the model weights" else "must be the checkpoint to evaluate"
        raise UserError(f"{key} {what}: {path}")
    try:
        unknown = unknown_types(path)
    except RuntimeError:
        raise UserError(f"{key} is torn, or no file of torch.save: {path}") from None
    if unknown:
        raise UserError(
            f"{key} names {', '.join(unknown)}, which could run code and is not read; "
            f"take the tensors alone into a file of their own: {path}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = "it is text, a plain pickle or something else"
        if "Unsupported global" in str(error):
            reason = "it holds code, or objects that are no tensors"
        raise UserError(f"{key} is no file of torch.save with weights alone ({reason}): {path}") from None
    check_content(content, weights.STATE_DICT_KEY_NAME, path)


def _plain(config: Any) -> Any:
    """A copy that YAML can write: torch's dtypes by name."""
    from vissl.config import AttrDict

    copy = AttrDict(config.to_dict())
    copy.MODEL.FSDP_CONFIG.compute_dtype = str(copy.MODEL.FSDP_CONFIG.compute_dtype).removeprefix("torch.")
    return copy


def run(args: Any, config: Any) -> None:
    """Start the ranks of this machine, or queue a job for SLURM.

    Args:
        args: VISSL's whole configuration.
        config: what is below ``config``.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
    from vissl.utils import distributed_launcher
    from vissl.utils.checkpoint import get_checkpoint_folder, is_training_finished

    from vissl_ext import catalog, ranks
    from vissl_ext.compat.checkpoints import resume_hint, trained_epochs

    distributed_launcher._distributed_worker = ranks.worker
    distributed_launcher._ResumableSlurmJob = ranks.SlurmJob
    catalog.register(config)
    if config.SLURM.USE_SLURM:
        distributed_launcher.launch_distributed_on_slurm(engine_name=args.engine_name, cfg=config)
        return
    for number in _ENDED:
        signal.signal(number, _interrupt)
    # Python's resource tracker removes the semaphores of ranks that were killed, and would warn after our last line
    quiet = ("ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS"))
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    folder = get_checkpoint_folder(config)
    print_on_rank_zero(f"run's folder: {folder}")
    if is_training_finished(config, checkpoint_folder=folder):
        print_on_rank_zero(
            f"the training there is finished, after {trained_epochs(Path(folder))} epochs; a larger "
            "config.OPTIMIZER.num_epochs goes on from its end"
        )
        return
    try:
        distributed_launcher.launch_distributed(
            cfg=config, node_id=args.node_id, engine_name=args.engine_name, hook_generator=ranks.hooks
        )
    except _Interrupted as interrupted:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _end(multiprocessing.active_children())
        raise _unfinished(folder, interrupted.number) from None
    except ProcessExitedException as error:
        _end(multiprocessing.active_children())
        number = next((number for number in _ENDED if error.exit_code in (-number, 128 + number)), None)
        if number is not None:  # a signal to all processes may reach the others first
            raise _unfinished(folder, number) from None
        how = f"was killed by {error.signal_name}" if error.signal_name else f"ended with status {error.exit_code}"
        print_on_rank_zero(f"process {error.error_index} of the training {how}; {resume_hint(Path(folder))}")
        raise SystemExit(128 - error.exit_code if error.exit_code < 0 else error.exit_code or 1) from None
    except ProcessRaisedException as error:
        if "UserError: " not in str(error):
            raise
        raise UserError(str(error)) from None


_AGAIN = 2.0
"""Seconds in which an interruption reaches the launcher, or is raised once more."""
_ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""The signals that end a training, and what is said of it."""


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. A KeyboardInterrupt is swallowed at vissl/utils/distributed_launcher.py:161, and the ranks
    train on.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: Any) -> None:
    for ignored in _ENDED:
        signal.signal(ignored, signal.SIG_IGN)  # once is enough

    def again(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        raise _Interrupted(number)

    # Python drops what is raised within a finalizer, such as those of a loader's processes: raise it until it arrives
    hide_dropped(_Interrupted)
    signal.signal(signal.SIGALRM, again)
    again()


def _unfinished(folder: str, number: int) -> SystemExit:
    """Say what a signal ended and how the training goes on; the exit status of a process that it ends."""
    from vissl_ext.compat.checkpoints import resume_hint

    print_on_rank_zero(f"{_ENDED[signal.Signals(number)]}; {resume_hint(Path(folder))}")
    return SystemExit(128 + number)


def _end(ranks: list[Any]) -> None:
    """End processes; those that do not within five seconds are killed."""
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(5)
        rank.kill()
        rank.join()


def command() -> None:
    """The command."""
    with exit_on_user_error():
        if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
            print(with_command_name(USAGE, "vissl_ext.launch"))
            raise SystemExit(0 if sys.argv[1:] else 2)
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:
            print_on_rank_zero("interrupted")
            raise SystemExit(130) from None


if __name__ == "__main__":
    command()
