"""Read the YAML file that defines the probes to fit::

    probes:
      - kind: linear            # or mlp, amdim_linear, amdim_mlp
        fraction: 1.0           # fraction of the training labels; default 1
        epochs: 100             # overrides the file's value
        optimizer: sgd          # or lars, adamw; default sgd
        lr: [0.3, 0.1]          # a number or a list, multiplied by batch size / 256; default: the file's value
        weight_decay: [1e-5, 1e-6]
        normalized: false       # true: add a BatchNorm without scale and shift before the probe
      - kind: linear            # a grid may combine several groups of settings
        grid:
          - {weight_decay: 1e-6, lr: 0.1}
          - {weight_decay: 0, lr: 0.01, optimizer: lars}
      - kind: logistic          # or svc: scikit-learn's classifiers on features scaled to [0, 1]
        search: 10              # number of random values of C; or C: a number or a list
    hidden_dim: 2048            # width of the hidden layers of an MLP
    holdout: 0.1                # held-out fraction of the labels for the choice of a setting
    batch_size: 512
    lr: 0.3
    epochs: 100

The values shown for the last five entries are their defaults. The grid contains every combination of a learning rate
and a weight decay, ordered by learning rate.
"""

from pathlib import Path
from typing import Any

from plugins.tools.command import UserError
from plugins.tools.probe import HIDDEN_LAYERS, KINDS, Probe, Setting
from plugins.tools.probe_sklearn import CLASSIFIERS
from plugins.tools.shipped import shipped_configs

_NUMBERS = (int, float, list)
_SHARED = {"hidden_dim": (int,), "holdout": (int, float), "batch_size": (int,), "lr": (int, float), "epochs": (int,)}
_TRAINING = {"weight_decay": _NUMBERS, "lr": _NUMBERS, "optimizer": (str,), "normalized": (bool,)}
_PROBE = {"kind": (str,), "fraction": (int, float)}
_WORDS = {
    (int,): "an integer",
    (int, float): "a number",
    (str,): "a string",
    (bool,): "true or false",
    (list,): "a list",
    _NUMBERS: "a number or a list of numbers",
}


def read_probes(path: Path) -> list[Probe]:
    """Read the probes of a YAML file.

    Args:
        path: path of a file, or name of a file in configs/probes.

    Returns:
        The probes, in the order of the file.

    Raises:
        UserError: the file is missing, or an entry is missing, unknown, of the wrong type or out of range.
    """
    import yaml
    from omegaconf import OmegaConf

    path = _found(path)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a valid YAML file: {' '.join(str(error).split())}") from None
    shared = _entries(content, {"probes": (list,), **_SHARED}, str(path), needed=("probes",))
    if not shared["probes"]:
        raise UserError(f"{path}: probes must contain at least one probe")
    probes = []
    for index, given in enumerate(shared.pop("probes")):
        place = f"{path}: probes[{index}]"
        probe = _probe(given, shared, place)
        try:
            probe.check()
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        probes.append(probe)
    return probes


def _found(path: Path) -> Path:
    places = [path, *([shipped_configs("probes") / f"{path.name}.yaml"] if len(path.parts) == 1 else [])]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"--config must be a YAML file or the name of one in configs/probes, got {path}")


def _probe(given: Any, shared: dict[str, Any], place: str) -> Probe:
    kind = given.get("kind") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind in CLASSIFIERS:
        own = _entries(given, {**_PROBE, "C": _NUMBERS, "search": (int,)}, place, needed=("kind",))
        chosen = {"C": tuple(_list(own.pop("C", []))), "search": own.pop("search", 0)}
    else:
        grouped = isinstance(given, dict) and "grid" in given
        kinds = {**_PROBE, "epochs": (int,), **({"grid": (list,)} if grouped else _TRAINING)}
        own = _entries(given, kinds, place, needed=("kind", "grid" if grouped else "weight_decay"))
        if kind not in HIDDEN_LAYERS:
            raise UserError(f"{place}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        groups = own.pop("grid", None)
        if groups is None:
            groups = [{key: own.pop(key) for key in _TRAINING if key in own}]
            places = [place]
        else:
            places = [f"{place}.grid[{index}]" for index in range(len(groups))]
        scale = shared.get("batch_size", Probe().batch_size) / 256
        settings = []
        for where, group in zip(places, groups, strict=True):
            entries = _entries(group, _TRAINING, where, needed=("weight_decay",))
            rates, decays = _list(entries.pop("lr", shared.get("lr", 0.3))), _list(entries.pop("weight_decay"))
            settings += [Setting(decay, rate * scale, **entries) for rate in rates for decay in decays]
        chosen = {"grid": tuple(settings)}
    return Probe(**{**{key: value for key, value in shared.items() if key != "lr"}, **own, **chosen})


def _list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _entries(given: Any, kinds: dict[str, tuple[type, ...]], place: str, *, needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) - set(kinds) or set(needed) - set(given):
        have = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        needs, may = ", ".join(needed), ", ".join(key for key in kinds if key not in needed)
        raise UserError(f"{place} must have the entries {needs}, and may have {may}, got {have}")
    for key, value in given.items():
        values = value if isinstance(value, list) and kinds[key] == _NUMBERS else [value]
        allowed = (int, float) if kinds[key] == _NUMBERS else kinds[key]
        fine = values and all(isinstance(v, allowed) and isinstance(v, bool) == (allowed == (bool,)) for v in values)
        if not fine:
            raise UserError(f"{place}: {key} must be {_WORDS[kinds[key]]}, got {value!r}")
    return dict(given)
