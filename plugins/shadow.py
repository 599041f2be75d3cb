"""Check that ``import plugins`` finds this package.

``python -m`` searches the working directory first, and many repositories have a folder ``plugins``. The packages
``*_ext`` run this file by its path, because ``import plugins.shadow`` would find the other folder.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

_OURS = Path(__file__).resolve().parent
_COMMANDS = {
    "solo_ext": "ssl-pretrain, ssl-linear, ssl-knn, ssl-umap or ssl-probe",
    "vissl_ext": "ssl-vissl",
    "lightly_ext": "ssl-lightly",
}


def other_plugins() -> Path | None:
    """Find the folder or file that hides this package.

    Returns:
        Its path, or None if ``import plugins`` finds this package.
    """
    try:
        spec = find_spec("plugins")
    except ValueError:  # it has been imported by unusual means
        return None
    if spec is None or spec.origin is None:
        return None  # a folder without __init__.py hides no package
    found = Path(spec.origin).resolve()
    place = found.parent if found.name == "__init__.py" else found
    return None if place == _OURS else place


def sentence(other: Path, package: str) -> str:
    """Return the error message: what is wrong, and what to do.

    Args:
        other: from :func:`other_plugins`.
        package: the ``*_ext`` package that needs this one.
    """
    if other.parent == Path.cwd().resolve():
        way = f"run the command from another folder, or run {_COMMANDS[package]}, which does not look into this one"
    else:
        way = f"rename it, or take {other.parent} out of Python's search path (PYTHONPATH, or the script's folder)"
    return f"{other} hides the package 'plugins' that {package} needs; {way}"


def check(package: str) -> None:
    """Raise an error if another ``plugins`` hides this package.

    Args:
        package: name of the ``*_ext`` package that is being imported.

    Raises:
        SystemExit: with status 2, after printing the message, if ``python -m`` imports the package.
        ImportError: with the message, otherwise.
    """
    other = other_plugins()
    if other is None:
        return
    if sys.argv[:1] == ["-m"]:  # Python's own mark while it looks for the module to run
        print(f"error: {sentence(other, package)}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(sentence(other, package), name="plugins")
