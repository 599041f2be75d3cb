"""Command python -m vissl_ext.launch, which extends VISSL's tools/run_distributed_engines.py by this package."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plugins.install import not_installed
from plugins.spelling import counted
from plugins.tools.bad_images import BadImages
from plugins.tools.command import UserError, exit_on_user_error, print_on_rank_zero, with_command_name
from plugins.tools.process import Stopped, exit_when_stopped

USAGE = """usage: python -m vissl_ext.launch config=NAME [OVERRIDE ...] [--config-dir FOLDER] [--import MODULE]

Trains or evaluates with VISSL 0.1.6. The arguments are those of VISSL's tools/run_distributed_engines.py: the name of a
configuration and overrides in Hydra's syntax.

  config=NAME           a configuration of VISSL (pretrain/simclr/simclr_8node_resnet), of ssl-plugins
                        (pretrain/isoloss/...), of ./configs/config or of FOLDER/config; --list shows all
  config.KEY=VALUE      override a value; +config.KEY=VALUE adds a key
  +config/GROUP=NAME    merge another file into the configuration
  engine_name=NAME      train (default), extract_features, knn, svm, svm_low_shot, cluster, retrieval, ...
  node_id=NUMBER        number of this machine in a run on several machines
  --config-dir FOLDER   a folder with a subfolder 'config'; may be repeated
  --import MODULE       import a module of yours, or a .py file, that registers losses, trunks, ...; may be repeated
  --list [TEXT]         list the configurations whose names contain TEXT

Images: config.DATA.TRAIN.DATA_PATHS=[FOLDER] is sufficient; the folder may have one subfolder per class.
Without a GPU, settings that need one are turned off and listed. The folder of the run, config.CHECKPOINT.DIR, contains
checkpoints, log.txt, metrics.json and train_config.yaml. The same command resumes an interrupted run from its last
checkpoint, and a finished run if config.OPTIMIZER.num_epochs is larger.

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
    """Run the command.

    Args:
        argv: the arguments, without the name of the program.

    Raises:
        UserError: an argument is invalid.
    """
    if find_spec("vissl") is None:
        raise UserError(not_installed("vissl"))
    overrides, folders, modules = _options(argv)
    if "--list" in overrides:
        from vissl_ext.compose import config_names

        places = [Path(folder).expanduser() for folder in folders]
        words = [word for word in overrides if word != "--list"]
        missing = next((place for place in places if not place.is_dir()), None)
        if missing is not None:
            raise UserError(f"--config-dir: there is no folder {missing}")
        names = [name for name in config_names(places) if all(word in name for word in words)]
        if not names:
            raise UserError(f"there is no configuration with {' and '.join(words)} in its name; --list shows all")
        print("\n".join(names))
        return
    unknown = next((word for word in overrides if word.startswith("-")), None)
    if unknown:
        raise UserError(f"unknown option {unknown}; see --help")
    args, config = prepare(overrides, folders, modules)
    run(args, config)


def _options(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Split the arguments into overrides, the folders of ``--config-dir`` and the modules of ``--import``."""
    overrides, words = [], iter(argv)
    values: dict[str, list[str]] = {"--config-dir": [], "--import": []}
    for word in words:
        option, _, value = word.partition("=")
        if option in values:
            value = value or next(words, "")
            if not value:
                what = "FOLDER" if option == "--config-dir" else "MODULE"
                raise UserError(f"{option} needs a {what.lower()}: {option} {what}")
            values[option].append(value)
        else:
            overrides.append(word)
    return overrides, values["--config-dir"], values["--import"]


def prepare(overrides: list[str], folders: list[str], modules: Sequence[str] = ()) -> tuple[Any, Any]:
    """Compose, validate and complete a configuration, and create the folder of the run.

    Args:
        overrides: ``config=NAME`` and Hydra's overrides.
        folders: the folders of ``--config-dir``.
        modules: the modules of ``--import``.

    Returns:
        VISSL's configuration, and its section ``config``.

    Raises:
        UserError: the configuration is invalid, or the folder cannot be used. No file has been written.
    """
    from classy_vision.optim import build_optimizer_schedulers
    from omegaconf import OmegaConf
    from vissl.utils.checkpoint import is_training_finished
    from vissl.utils.hydra_config import convert_to_attrdict, save_attrdict_to_disk

    from vissl_ext import catalog
    from vissl_ext.checks import check, check_engine, check_outputs, check_sections
    from vissl_ext.compat.checkpoints import checkpoints, reopen, set_aside, torn_name
    from vissl_ext.compat.console import hide_log
    from vissl_ext.compat.missing_weights import check_weights_file
    from vissl_ext.compose import compose
    from vissl_ext.defaults import adapt, set_sampler, without_slurm
    from vissl_ext.identity import check_same, run_settings, write_settings
    from vissl_ext.locks import lock
    from vissl_ext.masks import check_masks, complete_masks
    from vissl_ext.registry import register
    from vissl_ext.user_modules import KEY, import_modules

    hide_log()
    register()
    modules = import_modules(modules)
    cfg, given = compose(overrides, folders)
    if modules and OmegaConf.select(cfg.config, "LOSS.name") not in (None, *cfg.config.LOSS):
        cfg.config.LOSS[cfg.config.LOSS.name] = {}  # a loss of the user without options
    check_sections(cfg)
    changed, slurm = adapt(cfg, given), without_slurm(cfg.config, given)
    if cfg.engine_name == "train":
        set_sampler(cfg.config, given)
    # absolute, because processes of the run and symbolic links may have another working directory
    if cfg.config.CHECKPOINT.DIR in (None, ""):
        raise UserError(f"config.CHECKPOINT.DIR must be a folder, got {cfg.config.CHECKPOINT.DIR!r}")
    cfg.config.CHECKPOINT.DIR = str(Path(str(cfg.config.CHECKPOINT.DIR)).expanduser().absolute())
    weights = cfg.config.MODEL.WEIGHTS_INIT
    if str(weights.PARAMS_FILE or "").startswith("~"):
        weights.PARAMS_FILE = str(Path(weights.PARAMS_FILE).expanduser())
    given_paths = {split: cfg.config.DATA[split].DATA_PATHS for split in ("TRAIN", "TEST")}
    paths = {split: list(those) for split, those in given_paths.items() if OmegaConf.is_list(those)}
    complete_masks(cfg.config)
    lists = {}
    if cfg.engine_name != "retrieval":  # which does not read the images in DATA
        lists = catalog.complete(cfg.config, given, same_classes=cfg.engine_name in ("train", "svm", "svm_low_shot"))
    if cfg.engine_name == "train":
        check_masks(cfg.config, {path: lists[path] for path in cfg.config.DATA.TRAIN.DATA_PATHS if path in lists})
    check(cfg, given)
    if cfg.engine_name == "train":
        check_outputs(cfg.config)
    check_engine(cfg.engine_name, cfg.config)
    check_weights_file(weights)
    try:
        args, config = convert_to_attrdict(cfg, dump_config=False)
        build_optimizer_schedulers(deepcopy(config.OPTIMIZER))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"VISSL rejects the configuration: {str(error).strip().splitlines()[0]}") from None
    if modules:
        config[KEY] = modules
    folder = Path(config.CHECKPOINT.DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, args.node_id)
        settings = run_settings(cfg.engine_name, config, paths)
        before = check_same(folder, settings)
        for name in set_aside(folder):
            print_on_rank_zero(
                f"{name} is incomplete: it was renamed to {torn_name(name)}, and the checkpoint before it is used"
            )
        if is_training_finished(config, checkpoint_folder=str(folder)):
            return args, config  # nothing will be trained, so no file is changed
        resumes = config.CHECKPOINT.AUTO_RESUME and not config.CHECKPOINT.OVERWRITE_EXISTING
        if resumes:
            before = reopen(folder) or before
            if before is not None:
                print_on_rank_zero(
                    f"config.OPTIMIZER.num_epochs was {before} and is now {config.OPTIMIZER.num_epochs}: from here on "
                    "the learning rate and other schedules follow the new number of epochs"
                )
        write_settings(folder, settings)
        if not (resumes and checkpoints(folder)) and args.node_id == 0:
            BadImages(folder).reset()
        save_attrdict_to_disk(_plain(config))
        catalog.write_lists(lists)
    except OSError as error:
        raise UserError(f"config.CHECKPOINT.DIR cannot be written to: {error}") from None
    if slurm:
        print_on_rank_zero(slurm)
    if changed:
        print_on_rank_zero(f"on the CPU: {', '.join(changed)}")
    return args, config


def _plain(config: Any) -> Any:
    """Return a copy without torch's dtypes, which YAML cannot write."""
    from vissl.config import AttrDict

    copy = AttrDict(config.to_dict())
    copy.MODEL.FSDP_CONFIG.compute_dtype = str(copy.MODEL.FSDP_CONFIG.compute_dtype).removeprefix("torch.")
    return copy


def run(args: Any, config: Any) -> None:
    """Start the processes of the run on this machine, or submit a job to SLURM.

    Args:
        args: VISSL's configuration.
        config: its section ``config``.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
    from vissl.utils import distributed_launcher
    from vissl.utils.checkpoint import get_checkpoint_folder, is_training_finished

    from vissl_ext import catalog, ranks
    from vissl_ext.compat.checkpoints import resume_hint, trained_epochs
    from vissl_ext.compat.folder_images import finish_unreadable

    distributed_launcher._distributed_worker = ranks.worker
    distributed_launcher._ResumableSlurmJob = ranks.SlurmJob
    catalog.register(config)
    if config.SLURM.USE_SLURM:
        distributed_launcher.launch_distributed_on_slurm(engine_name=args.engine_name, cfg=config)
        return
    # Python's resource tracker removes the semaphores of killed processes, and would warn after the last line
    quiet = ("ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS"))
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    folder = get_checkpoint_folder(config)
    print_on_rank_zero(f"folder of the run: {folder}")
    if is_training_finished(config, checkpoint_folder=folder):
        print_on_rank_zero(
            f"the training is finished after {counted(trained_epochs(Path(folder)), 'epoch')}; increase "
            "config.OPTIMIZER.num_epochs to continue it"
        )
        return
    with exit_when_stopped(lambda: resume_hint(Path(folder))):
        try:
            distributed_launcher.launch_distributed(
                cfg=config, node_id=args.node_id, engine_name=args.engine_name, hook_generator=ranks.hooks
            )
            if args.engine_name != "train" and args.node_id == 0:  # a training does it in the hook Summary
                finish_unreadable(Path(folder), bool(config.DATA.get("SKIP_BAD_IMAGES")))
        except ProcessExitedException as error:
            for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes, of which another was the first
                if error.exit_code in (-number, 128 + number):
                    raise Stopped(number) from None
            how = f"was killed by {error.signal_name}" if error.signal_name else f"exited with status {error.exit_code}"
            print_on_rank_zero(f"process {error.error_index} of the run {how}; {resume_hint(Path(folder))}")
            raise SystemExit(128 - error.exit_code if error.exit_code < 0 else error.exit_code or 1) from None
        except ProcessRaisedException as error:
            if "UserError: " not in str(error):
                raise
            raise UserError(str(error)) from None
        finally:
            _end(multiprocessing.active_children())
            ranks.end_server()


def _end(processes: list[Any]) -> None:
    """Terminate processes, and kill those that have not exited after five seconds."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        process.kill()
        process.join()


def command() -> None:
    """Run the command with the arguments of the command line."""
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
