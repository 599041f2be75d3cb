"""Find and compose configurations: those of VISSL, of this package, and of folders of the user."""

import difflib
import re
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from plugins.tools.command import UserError, nearest
from plugins.tools.overrides import list_mistake, quote_override
from plugins.tools.shipped import shipped_configs
from vissl_ext.compat.linear_warmup import keep_warmup_of_fork

_DEFAULTS = Path(vissl.config.__file__).parent / "defaults.yaml"


@cache
def defaults() -> DictConfig:
    """Return VISSL's defaults.yaml, which is read once because it is long. Do not change the result."""
    # OmegaConf reads 1e-08 as a number, PyYAML as a string
    return OmegaConf.load(_DEFAULTS)


def compose(overrides: Sequence[str], folders: Sequence[str] = ()) -> tuple[DictConfig, dict[str, Any]]:
    """Compose a configuration like VISSL's tools.

    Options that this package adds need no ``+``, although they are missing in VISSL's defaults. A user's folder with
    ``pretrain/dstl`` or ``pretrain/cntr`` belongs to DISSL's fork of VISSL, which does not change the warm-up of the
    learning rate; its configurations get ``auto_lr_scaling.keep_warmup=true`` unless they set it.

    Args:
        overrides: ``config=NAME`` and Hydra's overrides.
        folders: folders of the user, each with a subfolder ``config``, like VISSL's ./configs. They are searched in
            this order, before ./configs, VISSL's folder and this package's folder.

    Returns:
        The configuration, with ``config`` as top-level key, and the overrides, key below ``config`` → value.

    Raises:
        UserError: Hydra cannot compose the configuration.
    """
    overrides, places = [quote_override(word) for word in overrides], []
    for folder in folders:
        place = Path(folder).expanduser().resolve()
        if not (place / "config").is_dir():
            raise UserError(f"--config-dir must be a folder with a subfolder 'config', got {folder}")
        places.append(place)
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        given = _given(overrides)
        search = create_config_search_path("pkg://vissl.config")
        if not any(entry.provider == "vissl_ext" for entry in search.get_path()):
            search.append("vissl_ext", f"file://{shipped_configs('vissl')}")
        for place in reversed(places):
            search.prepend("user", f"file://{place}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra's warnings are for the authors of the configurations
            Hydra.create_main_hydra2("vissl_ext", search)
            cfg = hydra_compose("defaults", overrides=[_addable(word) for word in overrides])
        _check_top(cfg, overrides)
        _fill(cfg.config, defaults().config, given)
        keep_warmup_of_fork(cfg.config, _config_file(overrides), [*places, Path("configs")])
        return cfg, given
    except MissingConfigException as error:
        raise UserError(_missing(error, given, places)) from None
    except YAMLError as error:
        raise UserError(f"a configuration is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_undecodable(places)} is not valid UTF-8 ({error.reason}): save it as UTF-8") from None
    except (HydraException, OmegaConfBaseException) as error:
        sentence = _one_line(error)
        for word in overrides:
            sentence = sentence.replace(f"++{word}", word)
        raise UserError(sentence) from None
    except TypeError as error:
        if (sentence := list_mistake(error, overrides)) is None:
            raise
        raise UserError(sentence) from None
    finally:
        GlobalHydra.instance().clear()
        if before is not None:
            GlobalHydra.instance().initialize(before)


def config_names(folders: Sequence[Path] = ()) -> list[str]:
    """Return the names that ``config=NAME`` accepts.

    Args:
        folders: folders of the user.
    """
    spec = find_spec("configs")
    stock = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    names = set()
    for folder in (*folders, Path("configs"), *stock, shipped_configs("vissl")):
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
        return f"{word!r} is not a valid argument: write KEY=VALUE, such as config=NAME; see --help"
    if value[:1] in "[{":
        return f"cannot parse {word!r}: write a list as [A,B], a mapping as {{KEY: VALUE}}; quote special characters"
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"""cannot parse {word!r}: quote a value with special characters, '{key}="{text}"'"""


def _own_options() -> dict[str, set[str]]:
    """Return section → names of the options that this package adds to it."""
    from classy_vision.losses import LOSS_REGISTRY

    from vissl_ext.registry import register
    from vissl_ext.trunks import BACKBONE_SECTIONS, CONVNEXT, STEM

    register()
    names = {name: getattr(kind, "option_names", None) for name, kind in LOSS_REGISTRY.items()}
    return {
        **{f"config.LOSS.{name}": option_names() for name, option_names in names.items() if option_names is not None},
        "config.DATA": {"SKIP_BAD_IMAGES"},
        "config.MODEL": {"MULTI_RES_SPLIT_CROPS"},
        "config.MODEL.TRUNK": {"OUT_FEATURE_KEYS", "CONVNEXT", *BACKBONE_SECTIONS, "PATCHES", "PER_SAMPLE_NORM"},
        "config.MODEL.TRUNK.CONVNEXT": set(CONVNEXT),
        **{f"config.MODEL.TRUNK.{section}": names for section, names in BACKBONE_SECTIONS.items()},
        "config.MODEL.TRUNK.RESNETS": {"CIFAR_STEM", *STEM, "Z_DIM_OLD_TMP_NEW", "IS_SKIP_RESIZER"},
        "config.OPTIMIZER.larc_config": {"exclude_bias_and_norm"},
        "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling": {"keep_warmup"},
    }


def _unknown_part(key: str) -> tuple[str, str, set[str]]:
    """Return the first part of a key that VISSL's defaults do not have: its section, the part, and the known names."""
    above, content, own = "", defaults(), _own_options()
    for part in key.split("."):
        known = {str(name) for name in content} if OmegaConf.is_dict(content) else set()
        known |= {path.rpartition(".")[2] for path in own if path.rpartition(".")[0] == above} | own.get(above, set())
        if part not in known:
            break
        above, content = f"{above}.{part}".removeprefix("."), content.get(part) if OmegaConf.is_dict(content) else None
    return above, part, known


def _addable(word: str) -> str:
    """Prepend ``++`` to an override of an option that this package adds, or of an option of a transform.

    The options of a transform are not in the composed configuration; ``checks`` validates them.
    """
    above, _, option = word.partition("=")[0].rpartition(".")
    is_of_transform = re.fullmatch(r"config\.DATA\.\w+\.TRANSFORMS\.\d+", above)
    return f"++{word}" if is_of_transform or option in _own_options().get(above, ()) else word


def _check_top(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Check that the overrides add no unknown top-level keys."""
    allowed = {"config", "hydra", *defaults()}
    for key in map(str, cfg):
        if "/" in key:
            raise UserError(
                f"{key}={cfg[key]}: there is no folder of configurations {key}; --list shows all configurations"
            )
        if key not in allowed and any(word.lstrip("+").startswith((f"{key}=", f"{key}.")) for word in overrides):
            raise UserError(f"{key} is not an option of VISSL; write +config.{key}=VALUE to add a key below config")


def _fill(config: DictConfig, default: DictConfig, given: dict[str, Any], above: str = "") -> None:
    """Set sections that a file leaves empty to their defaults, such as MACHINE of pretrain/datasets/imagenet."""
    for key, value in default.items():
        if not OmegaConf.is_dict(value) or key not in config:
            continue
        if config[key] is None and f"{above}{key}" not in given:
            config[key] = deepcopy(value)
        elif OmegaConf.is_dict(config[key]):
            _fill(config[key], value, given, f"{above}{key}.")


def _config_file(overrides: Sequence[str]) -> Path:
    """Return the path of the file of ``config=NAME`` within a folder of configurations."""
    parser = OverridesParser.create()
    names = [str(parser.parse_override(word).value()) for word in overrides if word.startswith("config=")]
    return Path("config", f"{names[-1].removesuffix('.yaml')}.yaml" if names else "")


def _undecodable(places: list[Path]) -> str:
    """Return the first file of the user's configurations that is not valid UTF-8."""
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
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --list shows all configurations"
    return f"there is no configuration {name!r}{hint}"


def _nearest(name: str, names: list[str]) -> list[str]:
    """Return up to three configurations whose name, or a part of it between slashes, is similar to a name."""
    last = name.rpartition("/")[2]

    def similarity(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        return max(whole, *(difflib.SequenceMatcher(None, last, part).ratio() for part in other.split("/")))

    scores = {other: similarity(other) for other in names}
    best = max(scores.values(), default=0.0)
    near = [other for other in names if scores[other] == best and best >= 0.75]
    return sorted(near, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))[:3]


def _one_line(error: Exception) -> str:
    """Return Hydra's error as one line. Its later lines are context or advice."""
    text = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    if "must specify 'config'" in str(error):
        return "there is no config=NAME among the arguments; see --help"
    if text[0].endswith(":") and len(text) > 1:
        text[0] = f"{text[0]} {text[1]}"
    cause = error.__cause__
    if cause is not None and str(cause) not in text[0]:
        text[0] += f" {str(cause).splitlines()[0]}"
    if "Could not override" in text[0] and "To append" in str(error):
        key = text[0].partition("'")[2].partition("'")[0]
        section, part, known = _unknown_part(key)
        if near := nearest(part, known):
            allowed = f"; allowed: {', '.join(sorted(known))}" if section.startswith("config.LOSS.") else ""
            return f"{section}: {part!r} is unknown, did you mean {near!r}?{allowed}"
        above, _, last = key.rpartition(".")
        own = _own_options().get(above, set())
        if above.startswith("config.LOSS.") and own:
            return f"{above}: {last!r} is unknown; allowed: {', '.join(sorted(own))}"
        return f"{above}: {last!r} is unknown; write +{key}=VALUE to add it"
    return text[0]
