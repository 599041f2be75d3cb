"""Names injected into lightly: lightly's names stay, pickles need no injection, and the injection can be undone."""

import importlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator

import lightly.loss
import lightly.models
import lightly.transforms
import pytest
import torch

import lightly_ext.loss
import lightly_ext.models
import lightly_ext.transforms
from lightly_ext import register, registry, unregister

pytestmark = pytest.mark.lightly


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing is registered before a test nor after it."""
    unregister()
    yield
    unregister()


def quietly_register() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models that lightly 1.5 has itself
        return register()


def test_names_can_be_imported_from_lightly() -> None:
    assert not hasattr(lightly.loss, "SSLEYLoss")
    names = quietly_register()
    from lightly.loss import SSLEYLoss
    from lightly.loss.ssley_loss import SSLEYLoss as of_file
    from lightly.models import IsoLoss
    from lightly.models.modules import SSLEYProjectionHead
    from lightly.models.modules.heads import DirectPredPredictionHead
    from lightly.transforms import SSLEYTransform
    from lightly.transforms.ssley_transform import SSLEYTransform as of_transforms_file

    assert SSLEYLoss is of_file is lightly_ext.loss.SSLEYLoss
    assert SSLEYTransform is of_transforms_file is lightly_ext.transforms.SSLEYTransform
    assert IsoLoss is lightly_ext.models.IsoLoss
    assert SSLEYProjectionHead.__module__ == DirectPredPredictionHead.__module__ == "lightly_ext.models.modules.heads"
    assert {"lightly.loss.SSLEYLoss", "lightly.models.IsoLoss", "lightly.transforms.IsoLossTransform"} <= set(names)


def test_unregister_leaves_lightly_as_it_was() -> None:
    modules = [importlib.import_module(f"lightly.{path}") for path in registry._MIRRORED]
    before = [dict(vars(module)) for module in modules]
    files = set(sys.modules)
    quietly_register()
    assert any(set(vars(module)) - set(names) for module, names in zip(modules, before, strict=True))
    unregister()
    unregister()
    assert [dict(vars(module)) for module in modules] == before
    assert set(sys.modules) == files
    with pytest.raises(ImportError):
        importlib.import_module("lightly.loss.ssley_loss")


def test_names_of_others_win_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, other = object(), object()
    monkeypatch.setattr(lightly.loss, "SSLEYLoss", theirs, raising=False)
    monkeypatch.setattr(lightly.models, "IsoLoss", other, raising=False)
    with pytest.warns(UserWarning) as caught:
        names = register()
    (warning,) = caught
    assert "lightly.loss.SSLEYLoss, " in str(warning.message) and "lightly.models.IsoLoss" in str(warning.message)
    assert lightly.loss.SSLEYLoss is theirs and lightly.models.IsoLoss is other
    assert "lightly.loss.SSLEYLoss" not in names
    unregister()
    assert lightly.loss.SSLEYLoss is theirs and lightly.models.IsoLoss is other


def test_lightlys_own_names_win_without_a_warning() -> None:
    clashes = {"BYOL", "SimSiam"} & set(vars(lightly.models))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register()
    assert not caught
    import lightly_ext.auto

    for path in registry._MIRRORED:
        ours, theirs = (importlib.import_module(f"{package}.{path}") for package in ("lightly_ext", "lightly"))
        kept = {name for name in ours.__all__ if vars(theirs)[name] is not vars(ours)[name]}
        assert path == "models" or all(f"``{name}``" in lightly_ext.auto.__doc__ for name in kept), kept
    assert lightly.transforms.DINOTransform.__module__.startswith("lightly.")
    for name in clashes:
        assert vars(lightly.models)[name].__module__.startswith("lightly."), "models of lightly 1.5"


def test_names_are_what_they_were() -> None:
    """Injection does not rename: a pickle names lightly_ext, and loads where nothing is registered."""
    quietly_register()
    from lightly.loss import SSLEYLoss
    from lightly.transforms import IsoLossTransform

    written = pickle.dumps([SSLEYLoss(), IsoLossTransform()])
    assert b"lightly_ext.loss" in written and b"lightly_ext.transforms" in written
    unregister()
    loss, transform = pickle.loads(written)
    assert type(loss) is lightly_ext.loss.SSLEYLoss and type(transform) is lightly_ext.transforms.IsoLossTransform


def test_reloading() -> None:
    quietly_register()
    own = lightly.loss.VICRegLoss
    importlib.reload(lightly.loss)
    assert lightly.loss.SSLEYLoss is lightly_ext.loss.SSLEYLoss
    assert lightly.loss.VICRegLoss is own
    first = lightly_ext.loss.SSLEYLoss
    quietly_register()
    assert lightly.loss.SSLEYLoss is first

    # our module is reloaded: the next register() replaces our names only
    importlib.reload(lightly_ext.loss.ssley_loss)
    importlib.reload(lightly_ext.loss)
    assert lightly_ext.loss.SSLEYLoss is not first
    quietly_register()
    assert lightly.loss.SSLEYLoss is lightly_ext.loss.SSLEYLoss
    unregister()
    importlib.reload(lightly.loss)
    assert not hasattr(lightly.loss, "SSLEYLoss")


class Views(torch.utils.data.Dataset):
    """Two views of a black image; the transform of the second and the third item is imported in the worker itself."""

    imports = (None, "", "import lightly_ext.auto; ")

    def __init__(self, transform: object) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return len(self.imports)

    def __getitem__(self, index: int) -> str:
        from PIL import Image

        transform = self.transform
        if index:
            try:
                exec(f"{self.imports[index]}from lightly.transforms import SSLEYTransform", scope := {})
            except ImportError as error:
                return f"ImportError {'SSLEYTransform' in str(error)}"
            transform = scope["SSLEYTransform"](input_size=8)
        return str([tuple(view.shape) for view in transform(Image.new("RGB", (8, 8)))])


WORKER = """
import sys
sys.path.insert(0, {folder!r})
from {module} import Views
from torch.utils.data import DataLoader

if __name__ == "__main__":
    import lightly_ext.auto
    from lightly.transforms import SSLEYTransform

    views = Views(SSLEYTransform(input_size=8))
    for text in DataLoader(views, batch_size=None, num_workers=1, multiprocessing_context="spawn"):
        print(text)
"""


@pytest.mark.slow
def test_spawned_loader_workers(tmp_path) -> None:
    """A transform that was made here works there; an import from lightly there needs lightly_ext.auto there."""
    from pathlib import Path

    script = tmp_path / "script.py"
    script.write_text(WORKER.format(folder=str(Path(__file__).parent), module=Path(__file__).stem))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**__import__("os").environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shapes = str([(3, 8, 8)] * 2)
    assert done.stdout.splitlines() == [shapes, "ImportError True", shapes]


def test_auto_registers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightly_ext.auto

        importlib.reload(lightly_ext.auto)
    assert lightly.loss.SSLEYLoss is lightly_ext.loss.SSLEYLoss


def test_without_lightly_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'lightly is not installed; .* pip install "ssl-plugins\[lightly\]"'):
        register()
