"""Functions that the commands share: find a configuration, run Hydra, and build Lightning's Trainer."""

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from plugins.tools.command import Parser, UserError, exit_on_user_error, nearest, with_command_name
from plugins.tools.overrides import list_mistake, quote_override
from plugins.tools.shipped import shipped_configs
from solo_ext.foreign_yaml import check_hydra
from solo_ext.schema import COMMANDS, Run, help_text, unknown_entry

_HYDRA_OPTIONS = (
    *("--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-dir", "--experimental-rerun"),
)
"""Options of the command line that belong to Hydra."""
_COMPOSE_ERRORS = (YAMLError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, FileNotFoundError)
"""Exceptions that Hydra raises while it reads and composes files, in addition to those of its own classes."""


def config_folder(given: str) -> Path:
    """Find the folder ``--config-path`` in the working directory or among the configurations of this package.

    Raises:
        UserError: there is no such folder.
    """
    path = Path(given).expanduser()
    shipped = Path(*path.parts[2:]) if path.parts[:2] == ("configs", "solo") else path
    for folder in (path, shipped_configs("solo") / shipped):
        if folder.is_dir():
            return folder.resolve()
    raise UserError(f"--config-path is not a folder: {given}")


def run_hydra(task: Callable[[DictConfig], None], usage: str, command: str) -> None:
    """Compose the configuration that the command line selects, and call a function with it.

    Args:
        task: the function. If it raises a UserError or FloatingPointError, the command prints a one-line error and
            exits with status 2.
        usage: printed for ``--help``, and when no configuration is given.
        command: a key of ``schema.COMMANDS``, for ``--help-config``.
    """
    with exit_on_user_error():
        if "--help-config" in sys.argv[1:]:
            print(help_text(command))
            raise SystemExit(0)
        if not sys.argv[1:] or {"--help", "-h"} & set(sys.argv[1:]):
            print(with_command_name(usage, task.__module__))
            raise SystemExit(0 if sys.argv[1:] else 2)
        parser = Parser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config-path", "-cp", required=True)
        parser.add_argument("--config-name", "-cn", required=True)
        given, rest = parser.parse_known_args()
        folder = config_folder(given.config_path)
        name = given.config_name.removesuffix(".yaml").removesuffix(".yml")
        file = next(filter(Path.is_file, (folder / f"{name}{suffix}" for suffix in (".yaml", ".yml"))), None)
        if file is None:
            have = sorted(path.stem for path in folder.glob("*.yaml"))
            near = nearest(name, have)
            hint = f"did you mean {near}?" if near else f"the folder contains: {', '.join(have) or 'none'}"
            raise UserError(f"there is no configuration {name!r} in {folder}; {hint}")
        check_file(file)
        for argument in rest:
            if argument.startswith("--") and argument.partition("=")[0] not in _HYDRA_OPTIONS:
                raise UserError(f"there is no option {argument}; set entries with key=value; see --help")
        overrides = [_addable(quote_override(argument)) for argument in rest]
        sys.argv[1:] = ["--config-path", str(folder), "--config-name", name, *overrides]

        check_hydra(folder, name, sys.argv[5:])
        started, user_error = False, None

        def guarded(cfg: DictConfig) -> None:
            nonlocal started, user_error
            started = True
            try:
                task(cfg)
            except (UserError, FloatingPointError) as error:
                # it is raised outside of Hydra, since Hydra would print the overrides first
                user_error = error

        hide_warnings()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints its own lines and exits with status 1
        try:
            hydra.main(version_base="1.2", config_path=None)(guarded)()
        except (HydraException, OmegaConfBaseException, *_COMPOSE_ERRORS) as error:
            if started:
                raise
            for path in sorted(folder.rglob("*.y*ml")):
                check_file(path, complete=False)
            if str(error).startswith("Ambiguous value"):
                raise UserError(
                    "an override has a comma outside of quotes; use key='a,b' for a string or key=[a,b] for a list"
                ) from None
            if isinstance(error, TypeError) and (sentence := list_mistake(error, rest)):
                raise UserError(sentence) from None
            if match := re.match(r"Could not override '(.+?)'", str(error)):
                raise UserError(_not_in_file(match[1], COMMANDS[command], file)) from None
            # the first two lines describe the error and its correction; the others are about Hydra's internals
            override = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
            raise UserError(override + " ".join(str(error).splitlines()[:2])[:300]) from None
        if user_error is not None:
            raise user_error


def _addable(override: str) -> str:
    """Prepend ``++`` to an option of the method, the optimiser or the network, because these are checked later."""
    return f"++{override}" if re.match(r"(method_kwargs|(optimizer|backbone)\.kwargs)\.\w+=", override) else override


def _not_in_file(key: str, model: type[Run], file: Path) -> str:
    """Return the error message for an override of an entry that the file does not have."""
    advice = f"{file} has no entry {key}; write ++{key}=VALUE to add it"
    return unknown_entry(model, key, list(trainer_arguments())) or advice


def check_file(path: Path, *, complete: bool = True) -> None:
    """Check that Hydra can use a YAML file.

    Args:
        path: the file.
        complete: whether the file is a configuration, which must have entries; otherwise it is a part of one, which may
            be a list or empty.

    Raises:
        UserError: the file cannot be read, is not YAML, or has no entries.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        OmegaConf.create(content if isinstance(content, list) else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML: {problem}{position}") from None
    except (OmegaConfBaseException, RecursionError, AssertionError) as error:
        problem = (str(error) or "it contains no entries").splitlines()[0][:200]
        raise UserError(f"{path} is not a configuration: {problem}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if complete and not isinstance(content, dict):
        found = "is empty" if content is None else f"is {'a list' if isinstance(content, list) else repr(content)}"
        raise UserError(f"{path} {found}, but a configuration is a mapping with entries such as max_epochs: 100")


def hide_warnings() -> None:
    """Hide warnings that a user of the command cannot act on."""
    for text in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*sync_dist=True.*",
        ".*You are using `LightningModule.log`.*",
        ".*in eval mode at the start of training.*",
        ".*Found .* module.*in eval mode.*",
        ".*lr_scheduler.step.*",
        ".*LeafSpec.*",
        ".*Overwriting .* in registry.*",
        ".*Importing from timm.*",
        ".*torch.cuda.amp.custom_.*",
        ".*ended before the epoch ended.*",  # our loaders leave out the images that the epoch has had
    ):
        warnings.filterwarnings("ignore", message=text)


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Convert errors that a constructor raises for its arguments to a UserError.

    Args:
        what: name of the object that is constructed, for the error message.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, OmegaConfBaseException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} does not accept the configuration: {reason}") from error


def trainer_arguments() -> dict[str, Any]:
    """Return {name: annotation} of the arguments of Lightning's Trainer."""
    from solo_ext.compat import pl

    arguments = inspect.signature(pl.Trainer.__init__).parameters
    return {name: argument.annotation for name, argument in arguments.items() if name != "self"}


def build_trainer(cfg: DictConfig, loggers: list[Any], callbacks: list[Any]) -> Any:
    """Build a Lightning Trainer from the entries of the configuration that its constructor accepts.

    Raises:
        UserError: Lightning does not accept an entry.
    """
    from solo_ext.compat import pl

    # Lightning sets its own loggers to INFO when it is imported
    for package in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    known = set(inspect.signature(pl.Trainer.__init__).parameters)
    given = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key in known}
    if given["strategy"] == "ddp":
        given["strategy"] = pl.strategies.DDPStrategy(find_unused_parameters=False)
    given.update(logger=loggers, callbacks=callbacks, enable_checkpointing=False)
    given.setdefault("enable_progress_bar", sys.stderr.isatty())
    given.setdefault("enable_model_summary", False)
    given.setdefault("num_sanity_val_steps", 0)
    given["use_distributed_sampler"] = False  # our loaders divide the images among the processes, each image once
    try:
        return pl.Trainer(**given)
    except (TypeError, ValueError, ImportError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"Lightning's Trainer does not accept the configuration: {error}") from None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, without Lightning's message."""
    from solo_ext.compat import pl

    os.environ.setdefault("PL_GLOBAL_SEED", str(seed))
    pl.seed_everything(seed, workers=True, verbose=False)
