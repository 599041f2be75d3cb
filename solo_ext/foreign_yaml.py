"""Check that the section ``hydra`` of a configuration runs no foreign code.

The section names classes and functions that Hydra calls: callbacks, launchers, sweepers and handlers of Python's
logging. A file from another person could name ``os.system``.
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


def check_hydra(folder: Path, name: str, words: Sequence[str]) -> None:
    """Compose the section ``hydra`` without executing it, and check what it would call.

    Args:
        folder: the folder of the YAML files.
        name: the file to compose.
        words: the overrides of the command line; values in them are trusted.

    Raises:
        UserError: the section names something that is not part of Hydra, or sets environment variables, or a file
            has YAML tags for Python objects.
    """
    parser, overrides = OverridesParser.create(), []
    try:
        for word in words:
            if not word.startswith("-") and not parser.parse_override(word).is_sweep_override():
                overrides.append(word)
        with initialize_config_dir(str(folder), version_base="1.2"):
            section = compose(name, overrides=overrides, return_hydra_config=True).hydra
    except YAMLError as error:
        raise UserError(f"{folder / name} is not plain YAML: {' '.join(str(error).split())}") from None
    except Exception:  # Hydra raises the same error before it executes the section, and the command reports it
        return
    finally:
        GlobalHydra.instance().clear()
    content = OmegaConf.to_container(section, resolve=False)
    trusted = _KNOWN | {word.partition("=")[2] for word in words}
    for place, value in _calls(content, "hydra"):
        if value not in trusted:
            raise UserError(f"{folder / name}: {place} lets Hydra call or write {value!r}; remove it from the file")
    if content.get("job", {}).get("env_set"):
        raise UserError(f"{folder / name}: hydra.job.env_set changes environment variables; set them in your shell")


def _calls(content: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield each entry below ``content`` that names something to import or call, and its value."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _CALLED or str(value).startswith(("ext://", "cfg://")):
                yield f"{place}.{key}", str(value)
            else:
                yield from _calls(value, f"{place}.{key}")
