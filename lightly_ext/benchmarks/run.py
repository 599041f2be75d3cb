"""The runs of ``python -m lightly_ext.benchmarks``."""

import argparse
import ast
import importlib.util
import inspect
import logging
import math
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import FinetuneClassifier, KNNClassifier, LinearClassifier, MetricCallback
from PIL import Image
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

from lightly_ext.benchmarks.methods import METHODS
from lightly_ext.models import MethodModel
from plugins.tools.command import UserError, first_process, say
from plugins.tools.data import SUFFIXES
from plugins.tools.files import atomic
from plugins.tools.fitting import mismatch
from plugins.tools.folders import ImageFolder, walk
from plugins.tools.images import open_image
from plugins.tools.process import exit_when_stopped, locked_folder
from plugins.tools.records import difference, versions, write_json, write_row
from plugins.tools.trainer import AtomicCheckpointIO, Guard

_LARGE = 64  # below this many pixels images are evaluated as they are, without cutting their margin off


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot run, before anything starts; completes ``args`` with the table of methods and the classes.

    Raises:
        UserError: one sentence.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    args.table = {**METHODS, **(_added(args.add) if args.add else {})}
    args.methods = list(dict.fromkeys(args.methods or METHODS))  # each once
    for name in args.methods:
        if name not in args.table:
            raise UserError(f"--methods: there is no method {name!r}; there are {', '.join(sorted(args.table))}")
    counts = {name: _images(name, getattr(args, name)) for name in ("train_dir", "val_dir")}
    args.classes = sorted(counts["train_dir"])
    if unknown := sorted(set(counts["val_dir"]) - set(args.classes)):
        raise UserError(f"--val-dir has the class {unknown[0]!r}, which --train-dir lacks")
    if len(args.classes) < 2:
        raise UserError(f"--train-dir must have at least two classes, got {len(args.classes)}: {args.train_dir}")
    images = sum(counts["train_dir"].values())
    at_least = {"batch_size_per_device": 2, "devices": 1, "epochs": 0, "num_workers": 0, "input_size": 1, "knn_k": 1}
    for name, least in {**at_least, "linear_epochs": 1, "finetune_epochs": 1}.items():
        if getattr(args, name) < least:
            raise UserError(f"{_flag(name)} must be at least {least}, got {getattr(args, name)}")
    if args.batch_size_per_device * args.devices > images:
        asked = args.batch_size_per_device * args.devices
        raise UserError(f"--batch-size-per-device: one batch of {asked} is more than the {images} training images")
    if args.knn_k > images and not args.skip_knn_eval:
        raise UserError(f"--knn-k {args.knn_k} is more than the {images} training images")
    for name, low in {"eval_min_scale": 1e-6, "eval_hf_prob": 0.0}.items():
        if not low <= getattr(args, name) <= 1:
            raise UserError(f"{_flag(name)} must be in [{low:g}, 1], got {getattr(args, name)}")
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std belong together")
    for name in ("std", "knn_t", "linear_lr", "finetune_lr"):
        for value in (getattr(args, name) or []) if name == "std" else [getattr(args, name)]:
            if not 0 < value < math.inf:
                raise UserError(f"{_flag(name)} must be a number above 0, got {value}")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be in [0, {2**32 - 1}], got {args.seed}")
    for folder in (args.log_dir, *args.log_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--log-dir: {folder} is no folder")
    if args.ckpt_path is not None and (len(args.methods) != 1 or not args.ckpt_path.is_file()):
        raise UserError(
            f"--ckpt-path needs a file and one method, got {args.ckpt_path} and {len(args.methods)} methods"
        )
    args.normalize = IMAGENET_NORMALIZE if args.mean is None else {"mean": args.mean, "std": args.std}
    args.option, args.transform = (_pairs(name, getattr(args, name)) for name in ("option", "transform"))
    args.strategy = args.strategy or ("auto" if args.devices == 1 else "ddp_find_unused_parameters_true")
    for name in args.methods:  # a misspelt option or backbone shows before the first method has trained
        if _is_ours(args, name):
            _check_transform(args, name)
            _model(args, name)
    if args.ckpt_path is not None:
        _check_same_run(args, args.methods[0], _load(args, _model(args, args.methods[0])))
    _check_trainer(args)


def _check_transform(args: argparse.Namespace, name: str) -> None:
    """Make two views of a black image: what an argument's value does shows when it is used."""
    try:
        _transform(args, name)(Image.new("RGB", (args.input_size, args.input_size)))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--transform: {_first_line(error)}") from None


def _check_trainer(args: argparse.Namespace) -> None:
    """Lightning knows which accelerators, strategies and precisions there are here."""
    chosen = {name: getattr(args, name) for name in ("accelerator", "devices", "strategy", "precision")}
    try:
        Trainer(**chosen, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        given = " ".join(f"{_flag(name)} {value}" for name, value in chosen.items())
        raise UserError(f"Lightning refuses {given}: {_first_line(error)}") from None


def _load(args: argparse.Namespace, model: LightningModule) -> dict[str, Any]:
    """Load the weights of --ckpt-path into the model; returns the checkpoint."""
    try:
        checkpoint = torch.load(args.ckpt_path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError):
        raise UserError(f"--ckpt-path: {args.ckpt_path} is no checkpoint of Lightning") from None
    if reason := mismatch(state, model.state_dict()):
        raise UserError(
            f"--ckpt-path: {args.ckpt_path} is of another method, backbone or options than {args.methods[0]}'s here: "
            f"{reason}"
        )
    model.load_state_dict(state)
    return checkpoint


# Arguments that change the images, the objective or the optimisation. --epochs may change: a run can be made longer.
_IDENTITY = (
    *("train_dir", "batch_size_per_device", "seed", "input_size", "normalize", "transform"),
    *("backbone", "small_images", "option", "optimizer", "lr", "weight_decay", "decay_all", "warmup_epochs"),
)


def _identity(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What makes a pre-training this one, in plain values."""
    same = {key: _plain_value(getattr(args, key)) for key in _IDENTITY}
    return {**same, "method": name, "train_dir": str(args.train_dir.resolve())}


def _check_same_run(args: argparse.Namespace, name: str, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to pre-train on from another run's checkpoint; one of an earlier release does not say whose it is."""
    if args.epochs == 0:
        return  # it is evaluated
    if checkpoint.get("epoch", -1) + 1 > args.epochs:
        raise UserError(
            f"--ckpt-path: {args.ckpt_path} has {checkpoint['epoch'] + 1} epochs behind it, more than "
            f"--epochs {args.epochs}"
        )
    theirs = checkpoint.get("callbacks", {}).get("EpochRecord", {}).get("identity", {})
    ours = _identity(args, name)
    for key in theirs:
        if theirs[key] != ours.get(key):
            where, there, here = difference(key, theirs[key], ours.get(key))
            raise UserError(
                f"--ckpt-path: {args.ckpt_path} is of another run: {where} is {there} there, {here} here; "
                "give that run's settings, or begin anew without --ckpt-path"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def benchmark(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train and evaluate each method; print and write the table.

    Args:
        args: checked.

    Returns:
        {method: result}.
    """
    results = {}
    for name in args.methods:
        with locked_folder(args.log_dir / name) if first_process() else nullcontext():
            results[name] = _one(args, name)
        table = markdown(results)
        if first_process():
            with atomic(args.log_dir / "table.md", "w") as file:
                file.write(table + "\n")
    say(table)
    return results


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results as a table, a row for each method; accuracies in percent.

    >>> print(markdown({"byol": {"epochs": 2, "knn": {"top1": 0.5, "top5": 1.0}}}))
    | Method | Epochs | kNN top1 | kNN top5 |
    |:-------|-------:|---------:|---------:|
    | byol   |      2 |    50.00 |   100.00 |
    """
    titles = {"knn": "kNN", "linear": "Linear", "finetune": "Fine-tune"}
    columns = [
        (kind, k)
        for kind in titles
        for k in ("top1", "top5")
        if any(k in result.get(kind, {}) for result in results.values())
    ]
    rows = [["Method", "Epochs", *(f"{titles[kind]} {k}" for kind, k in columns)]]
    for name, result in results.items():
        values = [result.get(kind, {}).get(k) for kind, k in columns]
        rows.append([name, str(result["epochs"]), *("–" if v is None else f"{100 * v:.2f}" for v in values)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        " | ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _one(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train and evaluate one method."""
    folder = args.log_dir / name
    if args.seed is not None:
        seed_everything(args.seed, workers=True, verbose=False)
    model = _model(args, name)
    result: dict[str, Any] = {"framework": "lightly", "method": name, "epochs": args.epochs, "seed": args.seed}
    result["versions"] = versions("lightly", "pytorch-lightning")
    result["config"] = {key: _plain_value(value) for key, value in vars(args).items() if key != "table"}
    if args.epochs == 0 and args.ckpt_path is not None:
        _load(args, model)
    elif args.epochs > 0:
        result.update(_pretrain(args, name, model, folder))
    if not args.skip_knn_eval:
        result["knn"] = _knn(args, model, folder)
    if not args.skip_linear_eval:
        result["linear"] = _classify(args, LinearClassifier, model, folder, "linear")
    if not args.skip_finetune_eval:
        result["finetune"] = _classify(args, FinetuneClassifier, model, folder, "finetune")
    if first_process():
        write_json(folder / "result.json", result)
    return result


def _pretrain(args: argparse.Namespace, name: str, model: LightningModule, folder: Path) -> dict[str, Any]:
    say(f"{name}: pre-training for {args.epochs} epochs")
    train = _loader(args, args.train_dir, _transform(args, name), shuffle=True)
    plain = _plain(args)
    held_out: Any = _loader(args, args.val_dir, plain)
    if _wants_knn(type(model)):  # lightly's newest models follow kNN while they train
        held_out = [_loader(args, args.train_dir, plain), held_out]
    stop = EarlyStopping(monitor="train_loss", patience=10**12, check_finite=True, check_on_train_epoch_end=True)
    # every epoch, where Lightning would save after validations alone, and before the callbacks' last word of the epoch
    save = ModelCheckpoint(folder, filename="checkpoint", enable_version_counter=False, save_on_train_epoch_end=True)
    record = EpochRecord(folder, _identity(args, name))
    # the record first: its state is in the checkpoint of the same epoch
    trainer = _trainer(args, folder, "pretrain", args.epochs, [record, stop, save], precision=args.precision)

    def resume_hint() -> str:
        last = folder / "checkpoint.ckpt"
        if record.epochs == 0 or not last.is_file():
            return "there is no checkpoint yet; run the command again"
        return f"run the command with --methods {name} --ckpt-path {last} to go on"

    with exit_when_stopped(resume_hint):
        trainer.fit(model, train, held_out, ckpt_path=None if args.ckpt_path is None else str(args.ckpt_path))
    loss = record.metrics.get("train_loss")  # None: nothing was left to train, of a run of an earlier release
    if loss is not None and not math.isfinite(loss):
        raise UserError(f"{name}: the loss is {loss} after epoch {record.epochs}; try a smaller --lr")
    speed = record.images * trainer.world_size / record.seconds if record.images else None
    return {
        "train_loss": loss,
        "online": record.metrics.get("val_online_cls_top1"),
        "seconds": round(record.elapsed, 2),
        "images_per_second": speed,
    }


def _knn(args: argparse.Namespace, model: LightningModule, folder: Path) -> dict[str, float]:
    classifier = KNNClassifier(
        model,
        num_classes=len(args.classes),
        knn_k=args.knn_k,
        knn_t=args.knn_t,
        train_dataloader_idx=0,
        val_dataloader_idx=1,
        topk=_topk(args),
    )
    metrics = MetricCallback()
    trainer = _trainer(args, folder, "knn", 1, [metrics])
    loaders = [_loader(args, path, _plain(args)) for path in (args.train_dir, args.val_dir)]
    trainer.validate(classifier, loaders, verbose=False)
    values = {name.partition("/")[0]: history[-1] for name, history in metrics.val_metrics.items()}
    return {f"top{k}": values[f"val_knn_top{k}"] for k in _topk(args)}


def _classify(
    args: argparse.Namespace, kind: type, model: LightningModule, folder: Path, name: str
) -> dict[str, float]:
    epochs, lr = {"linear": (args.linear_epochs, args.linear_lr), "finetune": (args.finetune_epochs, args.finetune_lr)}[
        name
    ]
    say(f"{folder.name}: {name} evaluation for {epochs} epochs")
    augmented = T.Compose(
        [
            T.RandomResizedCrop(args.input_size, scale=(args.eval_min_scale, 1.0)),
            T.RandomHorizontalFlip(args.eval_hf_prob),
            T.ToTensor(),
            T.Normalize(**args.normalize),
        ]
    )
    classifier = kind(
        model,
        batch_size_per_device=args.batch_size_per_device,
        lr=lr,
        feature_dim=model.online_classifier.feature_dim,
        num_classes=len(args.classes),
        topk=_topk(args),
    )
    model.train()  # a linear evaluation leaves it in evaluation mode, in which fine-tuning would train it
    metrics = MetricCallback()
    trainer = _trainer(args, folder, name, epochs, [metrics], precision=args.precision)
    train = _loader(args, args.train_dir, augmented, shuffle=True)
    trainer.fit(classifier, train, _loader(args, args.val_dir, _plain(args)))
    return {f"top{k}": metrics.val_metrics[f"val_top{k}"][-1] for k in _topk(args)}


class EpochRecord(Callback):
    """Writes metrics.csv, and with ``log_eigvals`` eigenvalues.csv, a row an epoch; measures the training's speed.

    The columns of metrics.csv are epoch and loss, the mean of ``train_loss`` over the epoch. ``images`` and ``seconds``
    are those of training alone, on this process; an image counts once, whatever the number of its views.

    Its state is in the checkpoints, so that a resumed run goes on counting.

    Args:
        folder: where the files go.
        identity: of the run, for its checkpoints.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.identity = dict(identity or {})
        self.images, self.seconds, self.epochs = 0, 0.0, 0
        self.metrics: dict[str, float] = {}
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the run, validation included."""
        return self._before + time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        counted = {"images": self.images, "seconds": self.seconds, "epochs": self.epochs, "elapsed": self.elapsed}
        return {**counted, "metrics": dict(self.metrics), "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.images, self.seconds, self.epochs = (state_dict[key] for key in ("images", "seconds", "epochs"))
        self.metrics, self._before = dict(state_dict["metrics"]), state_dict["elapsed"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; stop the clock at the epoch's last, before the validation."""
        self.images += len(batch[1])
        if "train_loss" in trainer.callback_metrics:
            self._losses.append(trainer.callback_metrics["train_loss"].detach().clone())
        if trainer.is_last_batch:
            self.seconds += time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows."""
        self.epochs = trainer.current_epoch + 1
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.metrics.update(found)
        if not trainer.is_global_zero:
            return
        if self._losses:
            loss = float(torch.stack(self._losses).mean())
            write_row(self.folder / "metrics.csv", trainer.current_epoch, {"loss": loss})
        if isinstance(pl_module, MethodModel) and pl_module.options.get("log_eigvals"):
            spectrum = pl_module.moment.spectrum().tolist()
            values = {f"eigval_{index}": value for index, value in enumerate(spectrum, 1)}
            write_row(self.folder / "eigenvalues.csv", trainer.current_epoch, values)


class RunGuard(Guard, Callback):
    """A run that does not finish ends with a status that is not 0, and leaves no process behind."""


class _CheckpointIO(AtomicCheckpointIO, TorchCheckpointIO):
    """Lightning's way to write checkpoints, with ours of making files."""


def _trainer(
    args: argparse.Namespace, folder: Path, name: str, epochs: int, callbacks: list[Callback], **more: Any
) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        callbacks=[RunGuard(), *callbacks],
        plugins=[_CheckpointIO()],
        logger=CSVLogger(str(folder), name=name, version=""),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=_validation_period(epochs),
        log_every_n_steps=10,
        # batch norm over processes needs a GPU
        sync_batchnorm=name == "pretrain" and args.devices > 1 and torch.cuda.is_available(),
        **more,
    )


def _validation_period(epochs: int) -> int:
    """Epochs between validations: at least ten of them in a long run, and one after the last epoch.

    >>> [_validation_period(epochs) for epochs in (1, 7, 12, 90, 100)]
    [1, 1, 1, 9, 10]
    """
    return max((period for period in range(1, epochs // 10 + 1) if epochs % period == 0), default=1)


def image_folder(folder: Path, transform: Any) -> LightlyDataset:
    """Class folders as lightly's data set; the images are decoded as in the other frameworks.

    Args:
        folder: with one folder per class.
        transform: of a PIL image in RGB.
    """
    return LightlyDataset.from_torch_dataset(ImageFolder(str(folder), loader=open_image), transform=transform)


def _loader(args: argparse.Namespace, folder: Path, transform: Any, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(
        image_folder(folder, transform),
        batch_size=args.batch_size_per_device,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=args.num_workers,
        persistent_workers=shuffle and args.num_workers > 0,
    )


def _plain(args: argparse.Namespace) -> Any:
    """Images as they are evaluated."""
    size = args.input_size
    resize = T.Resize(size if size <= _LARGE else size * 256 // 224)
    return T.Compose([resize, T.CenterCrop(size), T.ToTensor(), T.Normalize(**args.normalize)])


def _topk(args: argparse.Namespace) -> tuple[int, ...]:
    return (1, 5) if len(args.classes) >= 5 else (1,)


def _is_ours(args: argparse.Namespace, name: str) -> bool:
    return issubclass(args.table[name]["model"], MethodModel)


def _transform(args: argparse.Namespace, name: str) -> Any:
    """The transform of a method; ours take the arguments of the command line."""
    transform = args.table[name]["transform"]
    if not _is_ours(args, name):
        return transform
    given = {"input_size": args.input_size, "normalize": args.normalize, **args.transform}
    flat = type(transform)
    if (
        "view_1_transform" in inspect.signature(flat.__init__).parameters
    ):  # BYOL's of lightly has no arguments of its own
        from lightly_ext.transforms import TwoViewTransform

        flat = TwoViewTransform
    known = sorted(set(inspect.signature(flat.__init__).parameters) - {"self"})
    if "solarization_prob" in given and "solarization_prob" not in known:
        # lightly's transforms have two spellings of it, and those that never solarize have none
        probability = given.pop("solarization_prob")
        if "solarize_prob" in known:
            given.setdefault("solarize_prob", probability)
        elif probability != 0:
            given["solarization_prob"] = probability
    for key in given:
        if key not in known:
            raise UserError(f"--transform: {flat.__name__} has no argument {key!r}; it knows {', '.join(known)}")
    return flat(**given)


def _model(args: argparse.Namespace, name: str) -> LightningModule:
    """A model of the method; ours on the backbone and with the options of the command line."""
    cls = args.table[name]["model"]
    given: dict[str, Any] = {"batch_size_per_device": args.batch_size_per_device, "num_classes": len(args.classes)}
    if _wants_knn(cls):
        given.update(knn_k=args.knn_k, knn_t=args.knn_t)
    if _is_ours(args, name):
        given.update(backbone=_backbone(args), optimizer=args.optimizer, lr=args.lr, weight_decay=args.weight_decay)
        # options that another of the methods has
        several = {
            key for other in args.methods if _is_ours(args, other) for key in args.table[other]["model"].spec.options
        }
        own = args.table[name]["model"].spec
        given.update({key: value for key, value in args.option.items() if key in own.options or key not in several})
        given.update(warmup_epochs=args.warmup_epochs, decay_all=args.decay_all)
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from None


def _backbone(args: argparse.Namespace) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if args.backbone not in known:
        raise UserError(f"--backbone: torchvision has no model {args.backbone!r}; it has {', '.join(known)}")
    # a ViT takes images of the one size that it is made for
    sized = {"image_size": args.input_size} if args.backbone.startswith("vit_") else {}
    try:
        backbone = torchvision.models.get_model(args.backbone, weights=None, **sized)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--backbone {args.backbone} refuses --input-size {args.input_size}: {_first_line(error)}"
        ) from None
    for name in ("fc", "classifier", "heads", "head"):
        if name in backbone._modules:
            backbone._modules[name] = nn.Identity()
    if args.small_images:
        if not isinstance(backbone, torchvision.models.ResNet):
            raise UserError(f"--small-images is for ResNets, got --backbone {args.backbone}")
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone


def _wants_knn(cls: type) -> bool:
    return {"knn_k", "knn_t"} <= set(inspect.signature(cls.__init__).parameters)


def _added(path: Path) -> dict[str, dict[str, Any]]:
    """The METHODS dictionary of a Python file, which may import its neighbours."""
    if not path.is_file():
        raise UserError(f"--add: there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"added_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--add: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = vars(module).get("METHODS")
    if not isinstance(table, dict) or not all(
        isinstance(e, dict) and {"model", "transform"} <= set(e) for e in table.values()
    ):
        raise UserError(
            f"--add: {path} has no METHODS of the form {{name: {{'model': class, 'transform': transform}}}}"
        )
    return table


def _images(name: str, folder: Path) -> dict[str, int]:
    """How many images each class has."""
    if not folder.is_dir():
        raise UserError(f"{_flag(name)}: there is no folder {folder}")
    counts = {
        path.name: sum(name.lower().endswith(tuple(SUFFIXES)) for _, names in walk(path) for name in names)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    if not sum(counts.values()):
        raise UserError(f"{_flag(name)}: there are no images in class folders of {folder}")
    return counts


def _pairs(name: str, words: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words; a value that is no Python literal is a word."""
    pairs = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{_flag(name)} takes KEY=VALUE, got {word!r}")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pairs[key] = {"true": True, "false": False}.get(text.lower(), text)
    return pairs


def _plain_value(value: Any) -> Any:
    """A value as JSON can hold; a path by its name."""
    if isinstance(value, dict):
        return {key: _plain_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
