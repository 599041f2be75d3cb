"""The generic adapter, which trains the method of any MethodSpec with solo-learn.

Checkpoints have solo-learn's keys: backbone, projector, predictor, momentum_backbone, momentum_projector.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from plugins.checks import check_choice
from plugins.distributed import WORLD
from plugins.joined import ACCUMULATE, JoinedBatch
from plugins.linalg import spectrum_statistics
from plugins.objective import Objective, connect, embed, encode, encode_image, project
from plugins.predictors import ClosedFormPredictor, RunningMoment
from plugins.spec import Embeddings, MethodSpec, Terms
from plugins.taps import FeatureTaps
from plugins.targets import needs_teacher
from plugins.tools.command import UserError
from plugins.tools.stems import stem_record
from plugins.tools.trainer import check_strategy, ends_step, loss_scale, placeholder_loss, set_clock
from solo_ext.compat import BaseMethod, BaseMomentumMethod
from solo_ext.whole_set import WholeTrainingSet, training_set_size


class PluginMethod:
    """Mixin for solo-learn's base classes with the training step of all methods.

    Logged values, each with ``_step`` and ``_epoch`` appended by Lightning:

    * ``train_ssl_loss``, also under the ``log_name`` of the method. ``train_neg_cos_sim`` is a sum of distances
      (2 - 2 cos, or squared Euclidean) over both orders of the views, as in solo-learn, also for IsoLoss.
    * ``train_<term>``, the terms of the loss, such as ``train_cosine``, the mean cosine of prediction and target.
    * ``train_z_std``, the standard deviation of the normalised embedding: 1 / sqrt(D) when it is isotropic.
    * ``eigval_metrics/eigval_{min,max,mean,std}`` and ``eigval_metrics/part_ratio`` of the embedding's second moment,
      at every logged step and the last step of an epoch; ``_epoch`` is the mean over these steps.
    * ``quality/features/rankme`` and other metrics of :mod:`plugins.metrics` once an epoch, with the option
      ``log_quality``.
    * the values of solo-learn: ``train_class_loss`` (over labelled images), ``train_acc1``, ``train_acc5`` (an image
      without a label counts as wrong), ``tau``, ``val_loss``, ``val_acc1``, ``val_acc5``.

    With ``accumulate_grad_batches`` above 1, ``accumulate: mean`` trains on the mean of the micro-batches' losses, and
    ``accumulate: joined`` on the loss of their joined rows. The latter is exact except for batch norm, which uses the
    statistics of each micro-batch. It needs one more forward pass, and memory for the images of all micro-batches and
    the activations of one.
    """

    spec: ClassVar[MethodSpec]

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.options = self.spec.resolve(OmegaConf.to_container(cfg.method_kwargs))
        if self.spec.only_stacks:
            self.num_large_crops = self.num_crops = 1  # solo-learn takes the stack for a view
        self.spec.prepare(self.options, self.backbone)
        self.taps = self.spec.taps(self.options)
        self.projector = self._new_head()
        self.predictor = self.spec.predictor(self.options, WORLD) if self.spec.predictor else None
        self.objective = Objective(self.spec, self.options, WORLD, self.predictor, self.projector)
        self.log_eigvals = self.options.get("log_eigvals", False)
        self.accumulate = cfg.get("accumulate", "mean")
        check_choice("accumulate", self.accumulate, ACCUMULATE)
        self._joined: JoinedBatch | None = None
        self._joins_batches = False  # whether this step computes the loss of joined micro-batches
        self._ends_step = True  # whether this micro-batch is the last of its step

    def _new_head(self) -> nn.Module:
        head = self.spec.head(self.features_dim, self.options)
        connect(head, self.backbone, self.taps)
        return head

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimiser; the method's hints define how it treats each part."""
        betas = tuple(self.cfg.optimizer.kwargs.get("betas", (0.9, 0.999)))
        of_adam = self.cfg.optimizer.name in ("adam", "adamw")
        groups = []
        for name, parameters, hints in self.objective.groups:
            group = {"name": name, "params": [*parameters.values()], **hints.group_options(betas if of_adam else None)}
            if hints.lr_scale != 1.0:
                group["lr"] = self.lr * hints.lr_scale
            if hints.lr_constant:
                group["static_lr"] = True
            groups.append(group)
        return super().learnable_params + groups

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that DistributedDataParallel must not broadcast before each forward pass.

        Those of the objective are the same on all processes, and a memory of all images is large.
        """
        return [f"objective.{name}" for name, _ in self.objective.named_buffers()]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Compute ``feats``, ``logits`` and, in evaluation mode, the projections ``z`` of images ``[B, 3, H, W]``.

        The features of a stack ``[B, P, 3, h, w]`` are the mean of its ``patches``, ``[B, P, F]``, which it adds.
        """
        out = self._of_patches(X)
        if out is None:
            out = super().forward(X)
        if not self.training:
            out["z"] = self.projector(out["feats"])
        return out

    def base_forward(self, X: Tensor) -> dict[str, Tensor]:
        """Compute what ``forward`` of solo-learn 1.0.2 returns."""
        out = self._of_patches(X)
        return super().base_forward(X) if out is None else out

    def _of_patches(self, X: Tensor) -> dict[str, Tensor] | None:
        """Compute the output of ``forward`` of a stack or, in evaluation, of the patches of images; None for others."""
        evaluated = None if self.training else self.spec.eval_patches(self.options)
        if X.ndim == 5:
            patches = encode(self.backbone, X)
            out = {"feats": patches.mean(1), "patches": patches}
        elif evaluated is not None:
            out = {"feats": encode_image(self.backbone, X, evaluated)}
        else:
            return None
        return {"logits": self.classifier(out["feats"].detach()), **out}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the classification loss of the online classifier plus the method's loss.

        With ``accumulate: joined``, the last micro-batch of a step returns the loss of the joined micro-batches, and
        the others return 0.
        """
        if self._joins_batches:
            return self._joined_step(batch, batch_idx)
        out, features, maps = self._encoded(batch, lambda views: self._host_training_step(views, batch_idx))
        predict = self.predictor.predict if self.predictor is not None else None
        embeddings = embed(
            features,
            self.projector,
            predict,
            self._targets(out),
            large=self.num_large_crops,
            index=self._index(batch),
            maps=maps,
        )
        terms = self.objective(embeddings)
        self._log_step(terms, embeddings)
        return terms.loss + out["loss"]

    def _views_and_stacks(self, batch: Any) -> tuple[Any, list[Tensor]]:
        """Separate the views, which solo-learn processes, from the stacks of patches, which come last."""
        indexes, views, *rest = batch
        # solo-learn computes the features of the first stack if there are no views
        count = max(len(views) - self.spec.stacks, 1)
        return [indexes, views[:count], *rest], views[count:]

    def _encoded(
        self, batch: Any, step: Callable[[Any], dict[str, Any]]
    ) -> tuple[dict[str, Any], list[Tensor], list[tuple[Tensor, ...]]]:
        """Return the result of a step of solo-learn, the features of all views and stacks, and their maps."""
        views, stacks = self._views_and_stacks(batch)
        with FeatureTaps(self.backbone, self.taps) as taps:
            out = step(views)
            features = [*out.get("patches", out["feats"]), *(encode(self.backbone, stack) for stack in stacks)]
            return out, features, taps.take([view.shape[:-3] for view in batch[1]])

    def _index(self, batch: Any) -> Tensor | None:
        """Return the positions of the images in the training set, or None if the method does not use them."""
        return batch[0].reshape(-1).to(self.device, torch.int64) if self.spec.indexed else None

    def _joined_step(self, batch: Any, batch_idx: int) -> Tensor:
        def step(views: Any) -> dict[str, Any]:
            if torch.is_grad_enabled():
                return self._student_step(views, batch_idx)
            # the first of two forward passes, without gradients
            outs = [self(view) for view in views[1]]
            return {**{name: [out[name] for out in outs] for name in outs[0]}, "loss": None}

        def encode_batch(micro_batch: Any) -> tuple[Embeddings, Tensor | None]:
            out, features, maps = self._encoded(micro_batch, step)
            index = self._index(micro_batch)
            return embed(features, self.projector, large=self.num_large_crops, index=index, maps=maps), out["loss"]

        if self._joined is None:
            self._joined = JoinedBatch(encode_batch, [self.backbone, self.projector])
        self._joined.add(batch, lambda: self._joined_targets(batch[1][: self.num_large_crops]))
        if not self._ends_step:
            return placeholder_loss(self.device)
        joined, self._joined = self._joined, None
        predict = self.predictor.predict if self.predictor is not None else None
        terms, embeddings = joined.terms(self.objective, predict, self.predictor, scale=loss_scale(self.trainer))
        self._log_step(terms, embeddings)
        # Lightning divides the loss by accumulate_grad_batches
        return joined.backward() * self.trainer.accumulate_grad_batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the stem of the backbone."""
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(stem_record(self.backbone))

    def on_train_start(self) -> None:
        """Set the clock and the number of images, and discard an incomplete step of the optimiser after a resume."""
        super().on_train_start()
        self.objective.discard_step()
        if self.spec.indexed:
            try:
                self.objective.allocate(training_set_size(self.trainer))
            except ValueError as error:
                raise UserError(str(error)) from None
        set_clock(self.trainer, self.objective.clock)
        self._joined = None
        if self.accumulate == "joined":
            check_strategy(self.trainer, "accumulate=joined")
        if self.taps:
            check_strategy(self.trainer, f"method {self.spec.name}, which compares feature maps,")

    def on_train_epoch_start(self) -> None:
        """Start an epoch of the method, and drop the optimiser's state of parameters that it initialises anew."""
        super().on_train_epoch_start()
        feed = WholeTrainingSet(self.trainer, self._encode_views, [self.backbone, self.projector])
        for parameter in self.objective.start_epoch(self.current_epoch, feed):
            for optimizer in self.trainer.optimizers:
                optimizer.state.pop(parameter, None)

    def _encode_views(self, views: list[Tensor]) -> list[Tensor]:
        """Compute the features of the views of a pass over the training set, in the precision of the Trainer."""
        plugin = self.trainer.precision_plugin
        with plugin.forward_context():
            return [encode(self.backbone, plugin.convert_input(view)).float() for view in views]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Freeze parameters, after their gradients have been reduced over the processes."""
        super().on_before_optimizer_step(optimizer)
        self.objective.after_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step of the optimiser, end the step of the method, and update the teacher.

        Lightning calls the callbacks that write checkpoints before ``on_train_batch_end``, so that would be too late.
        """
        super().optimizer_step(*args, **kwargs)
        self._end_step()

    def _end_step(self) -> None:
        """End the step of the method."""
        self.objective.after_step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start a micro-batch, and a step of the optimiser if this is its first micro-batch."""
        super().on_train_batch_start(batch, batch_idx)
        self.objective.before_step()
        self._joins_batches = self.accumulate == "joined" and self.trainer.accumulate_grad_batches > 1
        self._ends_step = ends_step(self.trainer, batch_idx)

    def _host_training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().training_step(batch, batch_idx)

    def _student_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Run solo-learn's training step without the teacher."""
        return self._host_training_step(batch, batch_idx)

    def _joined_targets(self, views: list[Tensor]) -> list[Tensor] | None:
        """Return the teacher's projections of the large views of a micro-batch, or None without a teacher."""
        return None

    def _targets(self, out: dict[str, Any]) -> list[Tensor] | None:
        """Return the teacher's projections, or None without a teacher."""
        return None

    def _log_step(self, terms: Terms, embeddings: Embeddings) -> None:
        metrics = {f"train_{name}": value for name, value in self.objective.statistics(terms, embeddings).items()}
        # solo-learn logs the sum with the classifier's loss as train_loss
        metrics["train_ssl_loss"] = metrics.pop("train_loss")
        if self.spec.log_name:
            metrics[self.spec.log_name] = metrics["train_ssl_loss"]
        self.log_dict(metrics, on_epoch=True, sync_dist=True)

    @property
    def moment(self) -> RunningMoment | None:
        """The running second moment of the embedding, or None if the method does not track it."""
        return self.objective.tracked_moment(self.predictor)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the statistics of the embedding's spectrum.

        The names are those of implicit-var-reg. To save time, values are logged only in steps that Lightning writes
        and in the last step of an epoch.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        trainer = self.trainer
        if trainer.is_last_batch:
            self.log_dict(self.objective.epoch_quality(), on_step=False, on_epoch=True)
        is_logged = trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0
        if self.moment is None or not is_logged:
            return
        closed_form = isinstance(self.predictor, ClosedFormPredictor)  # it has already computed the eigenvalues
        spectrum = self.predictor.eigenvalues if closed_form else self.moment.spectrum()
        metrics = {f"eigval_metrics/{name}": value for name, value in spectrum_statistics(spectrum).items()}
        # the moment is the same on all processes: no reduction is needed
        self.log_dict(metrics, on_step=True, on_epoch=True)


class TeacherlessMethod(PluginMethod, BaseMethod):
    """A method without a teacher."""


class TeacherMethod(PluginMethod, BaseMomentumMethod):
    """A method with an exponential-moving-average teacher.

    With ``momentum.base_tau = momentum.final_tau = 0`` the teacher is the student, and the teacher's forward pass is
    left out.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.spec.prepare(self.options, self.momentum_backbone)
        self.momentum_projector = self._new_head()
        with torch.no_grad():
            for teacher, student in zip(self.momentum_projector.parameters(), self.projector.parameters(), strict=True):
                teacher.copy_(student)
        if self.spec.teacher_init is not None:
            self.spec.teacher_init(self.momentum_projector)
        self.momentum_projector.requires_grad_(False)
        if self.accumulate == "joined" and cfg.momentum.classifier:
            raise UserError(
                "accumulate=joined cannot train momentum.classifier; set momentum.classifier=False or accumulate=mean"
            )
        self.has_teacher = needs_teacher(cfg.momentum.base_tau, cfg.momentum.final_tau) or cfg.momentum.classifier
        students, teachers = zip(*self.momentum_pairs, strict=True)
        self.objective.set_teacher(teachers, students)

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a student module and the teacher module that averages it."""
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    def update_teacher(self) -> None:
        """End the step of the optimiser and update the teacher in place: θ_t ← τ θ_t + (1 − τ) θ."""
        self.objective.after_step(self.momentum_updater.cur_tau)

    def _end_step(self) -> None:
        """End the step of the method and update the teacher."""
        self.update_teacher()

    def after_optimizer_step(self) -> None:
        """Do nothing at the end of a batch, because ``optimizer_step`` has updated the teacher."""

    def _host_training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return (
            super()._host_training_step(batch, batch_idx) if self.has_teacher else self._student_step(batch, batch_idx)
        )

    def _student_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        # skip BaseMomentumMethod, whose step runs the teacher's forward pass
        return BaseMethod.training_step(self, batch, batch_idx)

    def _joined_targets(self, views: list[Tensor]) -> list[Tensor] | None:
        if not self.has_teacher:
            return None
        return project(self.momentum_projector, [self.momentum_forward(view)["feats"] for view in views])

    def _targets(self, out: dict[str, Any]) -> list[Tensor] | None:
        if not self.has_teacher:
            return None
        with torch.no_grad():
            return project(self.momentum_projector, out["momentum_feats"])
