"""The training that all methods share, in the manner of lightly's benchmarks."""

from collections.abc import Sequence
from typing import Any

import torch
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.benchmarking import OnlineLinearClassifier
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn

from lightly_ext import models
from lightly_ext.data import count, positions
from lightly_ext.models.method import whole
from plugins.checks import check_choice, check_range
from plugins.joined import ACCUMULATE, JoinedBatch
from plugins.linalg import spectrum_statistics
from plugins.spec import Embeddings
from plugins.targets import cosine_tau
from plugins.tools.command import UserError
from plugins.tools.labels import check_labels
from plugins.tools.stems import stem_record
from plugins.tools.trainer import (
    check_strategy,
    count_epochs,
    ends_step,
    loss_scale,
    placeholder_loss,
    run_steps,
    set_clock,
    start_at_epoch,
)

OPTIMIZERS = ("lars", "sgd", "adamw")
RATES = {"lars": 0.45, "sgd": 0.24, "adamw": 0.002}
"""Default learning rates for 256 images: LARS as in lightly's ImageNet benchmarks, the others for small data sets."""
LARGE_BATCH = 1024
"""Images of a joined batch from which LARS is the default: with small batches its steps are too small."""


class PartialSchedule(CosineWarmupScheduler):
    """lightly's schedule, but for the parameter groups that are marked ``keep_lr``.

    A resumed run follows the schedule of its own number of steps, which may differ from that of the checkpoint.
    """

    def get_lr(self) -> list[float]:
        """The learning rate of each group at this step."""
        groups = zip(self.optimizer.param_groups, self.base_lrs, strict=True)
        return [base if group["keep_lr"] else base * self.scale_lr(self.last_epoch) for group, base in groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step but not the length; set the learning rates of that step, which follow the new length."""
        length = ("warmup_epochs", "max_epochs")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in length})
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class TrainingSteps:
    """The hooks that a Trainer calls. ``bind`` combines them with a model class and a LightningModule.

    It logs ``train_loss``, the loss's other terms as ``train_<term>``, ``train_z_std``, ``tau`` of a teacher, and
    lightly's ``train_online_cls_*`` and ``val_online_cls_*`` of a linear classifier that learns beside the model. If
    the embedding's second moment is tracked, it logs ``eigval_{min,max,mean,std}`` and ``part_ratio`` (participation
    ratio of the eigenvalues) at the end of each epoch. With the option ``log_quality`` it logs
    ``quality/features/rankme`` and other metrics of :mod:`plugins.metrics` there.

    Batches are (views, targets, …). A method with a memory of images reads the third element of those of a
    ``lightly_ext.data.IndexedDataset``, whose length is the size of the memory.

    Args:
        batch_size_per_device: for the learning rate, which is ``lr`` for 256 images over all devices.
        num_classes: classes of the online classifier.
        backbone: as of the model classes; None is an untrained ResNet-50, as in lightly's benchmarks.
        optimizer: "lars" (momentum 0.9), "sgd" (momentum 0.9) or "adamw". None is LARS for joined batches of 1024
            images or more, else SGD.
        lr: learning rate for 256 images, > 0; it follows a cosine after a linear warm-up. None is 0.45 for LARS, 0.24
            for SGD and 0.002 for AdamW.
        weight_decay: of all parameters but biases, normalisation and the online classifier.
        decay_all: whether biases and normalisation decay too, as in the published runs of MEC and Matrix-SSL.
        warmup_epochs: at most the whole run. None is 10 epochs, but at most a tenth of the run, so that a run of fewer
            than 100 epochs reaches its learning rate too.
        base_tau: momentum of the teacher at its first update, in [0, 1].
        final_tau: at its last, in [0, 1].
        accumulate: with ``accumulate_grad_batches`` above 1 the loss of a step is the "mean" of its micro-batches'
            losses, or that of their "joined" rows, at the cost of one more forward pass. The images of all
            micro-batches are held, the activations of one at a time.
        options: those of the model class: input_dim, projection_head, teacher, num_samples, … and the method's own.

    Raises:
        ValueError: a value is out of range, or the model class does not accept an option.
    """

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        backbone: nn.Module | None = None,
        *,
        optimizer: str | None = None,
        lr: float | None = None,
        weight_decay: float = 1e-6,
        decay_all: bool = False,
        warmup_epochs: float | None = None,
        base_tau: float = 0.99,
        final_tau: float = 1.0,
        accumulate: str = "mean",
        **options: Any,
    ) -> None:
        if optimizer is not None:
            check_choice("optimizer", optimizer, OPTIMIZERS)
        check_choice("accumulate", accumulate, ACCUMULATE)
        for name, value in {"lr": lr, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs}.items():
            if value is not None:
                check_range(name, value, low=0.0)
        cosine_tau(0, 1, base_tau, final_tau)  # the ranges
        super().__init__(_resnet50() if backbone is None else backbone, **options)
        self.save_hyperparameters(
            {
                "batch_size_per_device": batch_size_per_device,
                "num_classes": num_classes,
                "optimizer": optimizer,
                "lr": lr,
                "weight_decay": weight_decay,
                "decay_all": decay_all,
                "warmup_epochs": warmup_epochs,
                "base_tau": base_tau,
                "final_tau": final_tau,
                "accumulate": accumulate,
                **{name: value for name, value in options.items() if not isinstance(value, nn.Module)},
            }
        )
        self.batch_size_per_device = batch_size_per_device
        topk = (1, 5) if num_classes >= 5 else (1,)
        self.online_classifier = OnlineLinearClassifier(self.feature_dim, num_classes, topk=topk)
        self._joined: JoinedBatch | None = None
        self._joining = False  # whether losses are joined
        self._last = True  # whether this micro-batch is the last of its step

    @property
    def criterion(self) -> Any:
        """The loss: Embeddings → its terms."""
        return self.terms

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the labels, and the positions that a method with a memory reads, while they are on the CPU.

        Raises:
            UserError: a label is not the number of a class.
            ValueError: a position is not that of an image of the training set.
        """
        if isinstance(batch, list | tuple) and len(batch) > 1:
            classes = self.online_classifier.num_classes
            check_labels(batch[1], classes, ignored=-100, where="a batch", what="the online classifier (num_classes)")
            if self.trainer.training and (index := self._index(batch)) is not None:
                positions(index, len(batch[1]), self.num_samples)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def _index(self, batch: Sequence[Any]) -> Any:
        """Return the positions of a batch's images in the training set; None if the method does not read them."""
        return batch[2] if self.spec.indexed and len(batch) > 2 else None

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Compute the method's loss plus that of the online classifier on the features of the first view.

        With ``accumulate="joined"`` it is 0 before the last micro-batch of a step, and the joined loss at the last.
        """
        if self._joining:
            return self._joined_step(batch, batch_idx)
        views, targets = batch[0], batch[1]
        features, embeddings = self.embed(views, self._index(batch))
        terms = self.terms(embeddings)
        statistics = {f"train_{name}": value for name, value in self.objective.statistics(terms, embeddings).items()}
        self.log("train_loss", statistics.pop("train_loss"), prog_bar=True, sync_dist=True, batch_size=len(targets))
        cls_loss, cls_log = self.online_classifier.training_step((whole(features[0]).detach(), targets), batch_idx)
        self.log_dict({**statistics, **cls_log}, sync_dist=True, batch_size=len(targets))
        return terms.loss + cls_loss

    def _joined_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        def encode(micro_batch: Sequence[Any]) -> tuple[Embeddings, Tensor | None]:
            features, embeddings = self._encode(micro_batch[0], self._index(micro_batch))
            if not torch.is_grad_enabled():  # the first of two passes
                return embeddings, None
            shown = whole(features[0]).detach()
            cls_loss, cls_log = self.online_classifier.training_step((shown, micro_batch[1]), batch_idx)
            self.log_dict(cls_log, sync_dist=True, batch_size=len(micro_batch[1]))
            return embeddings, cls_loss

        if self._joined is None:
            self._joined = JoinedBatch(encode, [self.backbone, self.projection_head])
        self._add(self._joined, batch, batch[0])
        if not self._last:
            return placeholder_loss(self.device)
        joined, self._joined = self._joined, None
        terms, embeddings = self._joined_terms(joined, loss_scale(self.trainer))
        statistics = {f"train_{name}": value for name, value in self.objective.statistics(terms, embeddings).items()}
        rows = len(embeddings.z[0])
        self.log("train_loss", statistics.pop("train_loss"), prog_bar=True, sync_dist=True, batch_size=rows)
        self.log_dict(statistics, sync_dist=True, batch_size=rows)
        # Lightning divides by the number of batches that a step accumulates
        return joined.backward() * self.trainer.accumulate_grad_batches

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Evaluate the online classifier on images without augmentation."""
        images, targets = batch[0], batch[1]
        cls_loss, cls_log = self.online_classifier.validation_step((self(images), targets), batch_idx)
        self.log_dict(cls_log, prog_bar=True, sync_dist=True, batch_size=len(targets))
        return cls_loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stem of the backbone."""
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(stem_record(self.backbone))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count the epochs of a checkpoint of an epoch's end, which Lightning does not with max_steps."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.max_steps != -1 and "loops" in checkpoint:
            count_epochs(self._trainer, checkpoint)

    def on_train_start(self) -> None:
        """Allocate a memory of images, and tell the method the length of the run.

        Raises:
            UserError: the method needs the number of training images, which the data loader does not tell.
        """
        start_at_epoch(self.trainer)
        images = count(self.trainer.train_dataloader)
        if self.spec.indexed and images is not None:
            try:
                self.allocate(images)
            except ValueError as error:
                raise UserError(str(error)) from None
        elif self.spec.indexed and self.num_samples is None:
            raise UserError(
                f"method {self.spec.name} needs the number of training images, which the data loader does not tell; "
                "make the module with num_samples=<number>"
            )
        self.objective.discard_step()  # of a run that was cut off within one
        set_clock(self.trainer, self.objective.clock)
        self._joined = None
        if self.hparams.accumulate == "joined":
            check_strategy(self.trainer, "accumulate=joined")
        if self.taps:
            check_strategy(self.trainer, f"method {self.spec.name}, which compares feature maps,")

    def _features(self, views: list[Tensor]) -> list[Tensor]:
        """Compute the features of the views of a pass over the training set, in the precision of the Trainer."""
        with self.trainer.precision_plugin.forward_context():
            return super()._features(views)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Freeze parameters."""
        self.after_backward()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start an epoch of the method, and open a step of the optimizer, whose micro-batches are those it accumulates.

        Lightning leaves ``on_train_epoch_start`` out if it resumes from a checkpoint after the last batch of an epoch.
        """
        if batch_idx == 0:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.start_epoch(self.current_epoch, self.trainer.train_dataloader, optimizer)
        self.before_step()
        self._joining = self.hparams.accumulate == "joined" and self.trainer.accumulate_grad_batches > 1
        self._last = ends_step(self.trainer, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step of the optimizer, end the step of the method, and move the teacher.

        Callbacks such as ModelCheckpoint come before ``on_train_batch_end``, so that it would be too late there.
        """
        done = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        if self.teacher_backbone is None:
            self.after_step()
            return
        total = max(1, int(self.trainer.estimated_stepping_batches))
        tau = cosine_tau(done, total, self.hparams.base_tau, self.hparams.final_tau)
        self.update_momentum(tau)
        self.log("tau", tau, batch_size=1)

    def on_train_epoch_end(self) -> None:
        """Log the statistics of the embedding's spectrum, and the quality, the same on all processes.

        The loggers get them here: Lightning itself logs an epoch's values after its checkpoint, and a run that is
        killed in between would lose them.
        """
        values = {} if self.moment is None else spectrum_statistics(self.moment.spectrum())
        values.update(self.objective.epoch_quality())
        if values:
            self.log_dict(values, logger=False)
            for logger in self.trainer.loggers:
                row = {name: float(value) for name, value in values.items()}
                logger.log_metrics({**row, "epoch": self.current_epoch}, step=self.global_step - 1)
                logger.save()

    def configure_optimizers(self) -> tuple[list[Any], list[dict[str, Any]]]:
        """Make the optimizer and its schedule over the whole run."""
        given = self.hparams
        images = self.batch_size_per_device * self.trainer.world_size
        kind = given.optimizer or ("lars" if images >= LARGE_BATCH else "sgd")
        lr = (RATES[kind] if given.lr is None else given.lr) * images / 256
        parts = [self.backbone, self.projection_head, self.prediction_head or nn.Identity(), self.objective.criterion]
        norms_and_biases = {id(parameter) for parameter in get_weight_decay_parameters(parts)[1]}
        groups, of_plain = [], given.weight_decay if given.decay_all else 0.0
        for name, parameters, hints in self._groups():
            own = hints.group_options((0.9, 0.999) if kind == "adamw" else None)
            wanted = {"lr": lr * hints.lr_scale, "keep_lr": hints.lr_constant, **own}
            for suffix, decay in (("", given.weight_decay), ("_norms_and_biases", of_plain)):
                chosen = [parameter for parameter in parameters if (id(parameter) in norms_and_biases) == bool(suffix)]
                groups.append({"name": name + suffix, "params": chosen, "weight_decay": decay, **wanted})
        classifier = list(self.online_classifier.parameters())
        fixed = {"weight_decay": 0.0, "keep_lr": False}
        groups.append({"name": "online_classifier", "params": classifier, "lr": lr, **fixed})
        groups = [group for group in groups if group["params"]]
        if kind == "adamw":
            optimizer: Any = torch.optim.AdamW(groups, lr=lr)
        else:
            optimizer = {"lars": LARS, "sgd": torch.optim.SGD}[kind](groups, lr=lr, momentum=0.9)
        total, of_epoch = run_steps(self.trainer)
        if given.warmup_epochs is None:
            warmup = min(total // 10, 10 * of_epoch) if of_epoch is not None else total // 10
        elif of_epoch is None and given.warmup_epochs:
            raise UserError(f"warmup_epochs={given.warmup_epochs} needs data of a known length; set warmup_epochs=0")
        else:
            warmup = min(total, int((of_epoch or 0) * given.warmup_epochs))
        schedule = PartialSchedule(optimizer, warmup_epochs=warmup, max_epochs=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def bind(name: str, base: type, module: str) -> type:
    """Make the class of a method for one package of Lightning.

    Args:
        name: name of a class of ``lightly_ext.models``.
        base: the LightningModule of the package.
        module: dotted name of the module that contains the class.
    """
    parent = vars(models)[name]
    doc = f"""{parent.spec.title} as a LightningModule, for a Trainer whose batches are (views, targets, …).

    The arguments are those of TrainingSteps and of ``lightly_ext.models.{name}``.
    """
    return type(name, (TrainingSteps, parent, base), {"__doc__": doc, "__module__": module})


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    backbone = resnet50()
    backbone.fc = nn.Identity()
    return backbone
