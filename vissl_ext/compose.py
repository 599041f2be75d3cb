"""Finding and composing a configuration: VISSL's stock ones, ours, and those of a folder of the user's own."""

import difflib
import warnings
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vissl.config
from hydra import compose as hydra_compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from plugins.tools.command import UserError, nearest
from plugins.tools.overrides import quote_override

_PACKAGE = Path(__file__).parent
_DEFAULTS = Path(vissl.config.__file__).parent / "defaults.yaml"
_OF_FORK = ("config/pretrain/dstl", "config/pretrain/cntr")
"""Folders of DISSL's VISSL fork that VISSL does not have."""


@cache
def defaults() -> DictConfig:
    """VISSL's defaults.yaml, read once: it is long. Not to be changed."""
    # OmegaConf reads 1e-08 as a number, PyYAML as a word
    return OmegaConf.load(_DEFAULTS)


def own_folder() -> Path:
    """Our configurations: in the package of an installed copy, beside it in a checkout."""
    places = [_PACKAGE / "configs", _PACKAGE.parent / "configs" / "vissl"]
    return next((place for place in places if place.is_dir()), places[0])


def compose(overrides: Sequence[str], folders: Sequence[str] = ()) -> tuple[DictConfig, dict[str, Any]]:
    """Compose as VISSL's tools do.

    Args:
        overrides: ``config=NAME`` and Hydra's overrides.
        folders: the user's, each with a folder ``config`` in it, as VISSL's ./configs has; the first is looked into
            first, before ./configs, VISSL's own and ours.

    A folder with ``pretrain/dstl`` or ``pretrain/cntr`` is that of DISSL's VISSL fork, which warms the learning rate up
    as its files have it: they get ``auto_lr_scaling.keep_warmup``, where they do not have it.

    Returns:
        The configuration, with ``config`` on top; and the keys below ``config`` that the overrides name, with the
        values that they give. An option of ours needs no ``+``, though VISSL's defaults do not have it.

    Raises:
        UserError: Hydra cannot make a configuration of it.
    """
    overrides, places = [quote_override(word) for word in overrides], []
    for folder in folders:
        place = Path(folder).expanduser().resolve()
        if not (place / "config").is_dir():
            raise UserError(f"--config-dir must name a folder with a folder 'config' in it, as VISSL has: {folder}")
        places.append(place)
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        given = _given(overrides)
        search = create_config_search_path("pkg://vissl.config")
        if not any(entry.provider == "vissl_ext" for entry in search.get_path()):
            search.append("vissl_ext", f"file://{own_folder()}")
        for place in reversed(places):
            search.prepend("user", f"file://{place}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra's advice is for the authors of the configurations
            Hydra.create_main_hydra2("vissl_ext", search)
            cfg = hydra_compose("defaults", overrides=[_addable(word) for word in overrides])
        _check_top(cfg, overrides)
        _fill(cfg.config, defaults().config, given)
        if _is_of_fork(overrides, [*places, Path("configs")]):
            _keep_warmup(cfg.config)
        return cfg, given
    except MissingConfigException as error:
        raise UserError(_missing(error, given, places)) from None
    except YAMLError as error:
        raise UserError(f"a configuration is no YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_undecodable(places)} is no UTF-8 text ({error.reason}): save it as UTF-8") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from None
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)


def config_names(folders: Sequence[Path] = ()) -> list[str]:
    """What ``config=`` can name: the files below ``config`` that are no part of another, as far as names tell.

    Args:
        folders: the user's.
    """
    spec = find_spec("configs")
    stock = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    names = set()
    for folder in (*folders, Path("configs"), *stock, own_folder()):
        root = folder / "config"
        names |= {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")}
    return sorted(names)


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    given, parser = {}, OverridesParser.create()
    for word in overrides:
        try:
            override = parser.parse_override(word)
        except HydraException:
            raise UserError(_unreadable(word)) from None
        if override.key_or_group.startswith("config.") and not override.is_delete():
            given[override.key_or_group.removeprefix("config.")] = override.value()
    return given


def _unreadable(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is no argument: write KEY=VALUE, such as config=NAME or config.KEY=VALUE; see --help"
    if value[:1] in "[{":
        return f"cannot read {word!r}: a list is [A,B], a section {{KEY: VALUE}}; quote what has other signs in it"
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"""cannot read {word!r}: quote a value that has such signs in it, '{key}="{text}"'"""


def _own_options() -> dict[str, set[str]]:
    """Options that we add to sections of VISSL's, or in sections of our own."""
    from classy_vision.losses import LOSS_REGISTRY

    from vissl_ext.registry import register
    from vissl_ext.trunks import CONVNEXT

    register()
    names = {name: getattr(kind, "option_names", None) for name, kind in LOSS_REGISTRY.items()}
    return {
        **{f"config.LOSS.{name}": option_names() for name, option_names in names.items() if option_names is not None},
        "config.MODEL": {"MULTI_RES_SPLIT_CROPS"},
        "config.MODEL.TRUNK": {"OUT_FEATURE_KEYS", "CONVNEXT"},
        "config.MODEL.TRUNK.CONVNEXT": set(CONVNEXT),
        "config.MODEL.TRUNK.RESNETS": {"CIFAR_STEM", "Z_DIM_OLD_TMP_NEW", "IS_SKIP_RESIZER"},
        "config.OPTIMIZER.larc_config": {"exclude_bias_and_norm"},
        "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling": {"keep_warmup"},
    }


def _addable(word: str) -> str:
    """An override of one of our options as one that adds it where it is not there."""
    above, _, option = word.partition("=")[0].rpartition(".")
    return f"++{word}" if option in _own_options().get(above, ()) else word


def _check_top(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse what the command line puts beside ``config``, where nothing reads it."""
    known = {"config", "hydra", *defaults()}
    for key in map(str, cfg):
        if "/" in key:
            raise UserError(
                f"{key}={cfg[key]}: no folder of configurations is named {key}; --list names those there are"
            )
        if key not in known and any(word.lstrip("+").startswith((f"{key}=", f"{key}.")) for word in overrides):
            raise UserError(f"nothing reads {key}; write +config.{key}=VALUE for an entry of the configuration")


def _fill(config: DictConfig, default: DictConfig, given: dict[str, Any], above: str = "") -> None:
    """Give back its defaults to a section of which a file has the name alone, as pretrain/datasets/imagenet MACHINE."""
    for key, value in default.items():
        if not OmegaConf.is_dict(value) or key not in config:
            continue
        if config[key] is None and f"{above}{key}" not in given:
            config[key] = deepcopy(value)
        elif OmegaConf.is_dict(config[key]):
            _fill(config[key], value, given, f"{above}{key}.")


def _is_of_fork(overrides: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether the file that ``config=`` names comes from a folder of the user's that is that of DISSL's VISSL fork.

    Files of the fork with a loss of VISSL's own, such as its SimCLR, are told by their neighbours alone.
    """
    parser = OverridesParser.create()
    names = [str(parser.parse_override(word).value()) for word in overrides if word.startswith("config=")]
    file = Path("config", f"{names[-1].removesuffix('.yaml')}.yaml") if names else Path("config")
    folder = next((folder for folder in folders if (folder / file).is_file()), None)
    return folder is not None and any((folder / place).is_dir() for place in _OF_FORK)


def _keep_warmup(config: DictConfig) -> None:
    """Let the learning rate be warmed up as the file has it, unless it says whether to."""
    scaling = OmegaConf.select(config, "OPTIMIZER.param_schedulers.lr.auto_lr_scaling")
    if OmegaConf.is_dict(scaling) and "keep_warmup" not in scaling:
        with open_dict(scaling):
            scaling.keep_warmup = True


def _undecodable(places: list[Path]) -> str:
    """The first file of the user's configurations that is no UTF-8."""
    for place in (*places, Path("configs")):
        for path in sorted((place / "config").rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return str(path)
    return "a configuration"


def _missing(error: MissingConfigException, given: dict[str, Any], places: list[Path]) -> str:
    name = str(error.missing_cfg_file or "").removeprefix("config/").removesuffix(".yaml")
    near = _nearest(name, config_names(places))
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --list names those there are"
    return f"there is no configuration {name!r}{hint}"


def _nearest(name: str, names: list[str]) -> list[str]:
    """Up to three configurations whose whole name, or a part of it between slashes, is nearly what was given."""
    last = name.rpartition("/")[2]

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        return max(whole, *(difflib.SequenceMatcher(None, last, part).ratio() for part in other.split("/")))

    scores = {other: likeness(other) for other in names}
    best = max(scores.values(), default=0.0)
    near = [other for other in names if scores[other] == best and best >= 0.75]
    return sorted(near, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))[:3]


def _sentence(error: Exception) -> str:
    """What Hydra says, in one line: its later lines are context or advice."""
    text = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    if "must specify 'config'" in str(error):
        return "no configuration is named; begin with config=NAME, see --help"
    if text[0].endswith(":") and len(text) > 1:
        text[0] = f"{text[0]} {text[1]}"
    cause = error.__cause__
    if cause is not None and str(cause) not in text[0]:
        text[0] += f" {str(cause).splitlines()[0]}"
    if "Could not override" in text[0] and "To append" in str(error):
        key = text[0].partition("'")[2].partition("'")[0]
        above, _, last = key.rpartition(".")
        ours = _own_options().get(above, set())
        if above.startswith("config.LOSS.") and ours:
            hint = f"it knows {', '.join(sorted(ours))}"
        else:
            hint = f"write +{key}=VALUE to add one"
        beside = OmegaConf.select(defaults(), above) or {}
        near = nearest(last, [*ours, *beside])
        if near:
            hint = f"did you mean {near}?" + (f" {above} knows {', '.join(sorted(ours))}" if len(ours) > 1 else "")
        return f"the configuration has no key {key}; {hint}"
    return text[0]
