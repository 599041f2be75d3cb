"""Check that the section ``hydra`` of a configuration does not run code from an untrusted source.

The section contains names of classes and functions that Hydra calls: callbacks, launchers, sweepers and handlers of
Python's logging. A YAML file from another person could contain ``os.system``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from yaml import YAMLError

from plugins.tools.command import UserError

_CALLED = ("_target_", "()", "class", "filename")
"""Keys whose values Hydra and ``logging.config`` import and call, or open for writing."""
_KNOWN = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra.experimental.callbacks.LogJobReturnCallback",
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"),
    "colorlog.ColoredFormatter",
    *("ext://sys.stdout", "ext://sys.stderr"),
    "${hydra.runtime.output_dir}/${hydra.job.name}.log",
}


def check_hydra(folder: Path, name: str, arguments: Sequence[str]) -> None:
    """Compose the section ``hydra`` without executing it, and check the names that Hydra would call.

    Args:
        folder: the folder of the YAML files.
        name: the file to compose.
        arguments: options and overrides of the command line. The values of overrides are trusted.

    Raises:
        UserError: the section contains a name that is not one of Hydra's defaults, or sets environment variables, or a
            file has YAML tags for Python objects.
    """
    parser, overrides = OverridesParser.create(), []
    try:
        for argument in arguments:
            if not argument.startswith("-") and not parser.parse_override(argument).is_sweep_override():
                overrides.append(argument)
        with initialize_config_dir(str(folder), version_base="1.2"):
            section = compose(name, overrides=overrides, return_hydra_config=True).hydra
    except YAMLError as error:
        raise UserError(f"{folder / name} is not plain YAML: {' '.join(str(error).split())}") from None
    except Exception:  # Hydra raises the same error before it executes the section, and the command reports it
        return
    finally:
        GlobalHydra.instance().clear()
    content = OmegaConf.to_container(section, resolve=False)
    trusted = _KNOWN | {argument.partition("=")[2] for argument in arguments}
    for key, value in _calls(content, "hydra"):
        if value not in trusted:
            raise UserError(f"{folder / name}: {key} lets Hydra call or write {value!r}; remove it from the file")
    if content.get("job", {}).get("env_set"):
        raise UserError(f"{folder / name}: hydra.job.env_set changes environment variables; set them in your shell")


def _calls(content: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and value of each entry that Hydra or ``logging.config`` imports, calls or opens for writing."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _CALLED or str(value).startswith(("ext://", "cfg://")):
                yield f"{path}.{key}", str(value)
            else:
                yield from _calls(value, f"{path}.{key}")
