"""Check that ``import plugins`` finds this package, and that the framework is not a fork in the working directory.

``python -m`` searches the working directory first. Many repositories have another folder named ``plugins``, and the
checkout of a fork contains a framework with methods of the same names. The packages ``*_ext`` run this file by path,
because ``import plugins.shadow`` would find the other folder.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_OURS = Path(__file__).resolve().parent
_COMMANDS = {
    "solo_ext": "ssl-pretrain, ssl-linear, ssl-knn, ssl-umap or ssl-probe",
    "vissl_ext": "ssl-vissl",
    "lightly_ext": "ssl-lightly",
}

_FORKS = {
    "solo_ext": ("solo/losses/isoloss.py", "solo/losses/ssley.py"),
    "vissl_ext": ("vissl/losses/dstl_issl_loss.py",),
}
"""Adapter → files by which the checkout of a fork is recognised."""


def leave_fork(package: str) -> None:
    """Import the installed framework if the working directory is a fork of it; print a line.

    Args:
        package: name of the ``*_ext`` package that is being imported by ``python -m``.
    """
    here = Path.cwd()
    if not any((here / name).is_file() for name in _FORKS.get(package, ())):
        return
    kept = [place for place in sys.path if Path(place or ".").resolve() != here.resolve()]
    if len(kept) < len(sys.path):
        sys.path[:] = kept
        name = package.removesuffix("_ext")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{here / name} is a fork: the installed {name} is used", file=sys.stderr)


def other_plugins() -> Path | None:
    """Find the folder or file that hides this package.

    Returns:
        Its path, or None if ``import plugins`` finds this package.
    """
    try:
        spec = find_spec("plugins")
    except ValueError:  # plugins is in sys.modules without a spec
        return None
    if spec is None or spec.origin is None:
        return None  # a folder without __init__.py does not hide a package
    found = Path(spec.origin).resolve()
    place = found.parent if found.name == "__init__.py" else found
    return None if place == _OURS else place


def sentence(other: Path, package: str) -> str:
    """Build the error message.

    Args:
        other: from :func:`other_plugins`.
        package: the ``*_ext`` package that needs this one.

    Returns:
        One sentence that says which folder or file hides this package, and what to do.
    """
    if other.parent == Path.cwd().resolve():
        way = f"run the command in another folder, or run {_COMMANDS[package]}, which does not search this folder"
    else:
        way = f"rename it, or remove {other.parent} from Python's search path (PYTHONPATH, or the script's folder)"
    return f"{other} hides the package 'plugins' that {package} needs; {way}"


def check(package: str) -> None:
    """Check the installation when an adapter is imported.

    A command also needs the packages of its extra. A library user may import a part of an adapter without them.

    Args:
        package: name of the ``*_ext`` package that is being imported.

    Raises:
        SystemExit: with status 2, after a one-line error, if the package is imported by ``python -m`` or by a console
            script, and another package ``plugins`` hides this one or a required package is not installed.
        ImportError: if another package ``plugins`` hides this one, in any other program.
    """
    # sys.argv[0] is "-m" while Python locates the module to run
    command = sys.argv[:1] == ["-m"] or Path(*sys.argv[:1]).name.startswith("ssl-")
    if command:
        leave_fork(package)
    other = other_plugins()
    if other is not None:
        error = sentence(other, package)
        if not command:
            raise ImportError(error, name="plugins")
    elif command:
        from plugins.install import missing

        error = missing(package)
    else:
        error = None
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
