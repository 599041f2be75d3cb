"""The generic adapter: any MethodSpec as an nn.Module around the user's backbone.

A training loop, with or without a teacher::

    from lightly.utils.scheduler import cosine_schedule
    from lightly_ext.models import IsoLoss

    model = IsoLoss(backbone)
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.06)
    for step, (views, *_) in enumerate(dataloader):
        loss = model.loss(views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_momentum(cosine_schedule(step, max_steps, 0.99, 1))

Warm-ups and the running second moment count optimizer steps. In a model with a teacher ``update_momentum`` ends the
step: all losses since the last call are those of its micro-batches. In a model without a teacher each loss is one step;
a loop that accumulates gradients calls ``before_step`` before the first micro-batch, and ``after_step`` (or
``update_momentum``) after ``optimizer.step()``::

    model.before_step()
    for views in micro_batches:
        (model.loss(views) / len(micro_batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.after_step()

The mean of the micro-batches' losses is not the loss of their joined rows. ``joined_loss`` is, exactly, at the cost of
one more forward pass; its ``backward`` completes the gradients::

    model.joined_loss(micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightly_ext.models.modules.heads import scale_last_layer
from plugins.checks import check_range
from plugins.distributed import LOCAL, WORLD
from plugins.heads import TwoBranchHead
from plugins.joined import JoinedBatch
from plugins.objective import Objective, embed
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, MethodSpec, Terms, large_views
from plugins.targets import update_teacher

_PROBE = (1, 3, 224, 224)
_BRANCHES = {
    True: "two heads; pass projection_head=plugins.heads.TwoBranchHead(Heads(teacher, student), input_dim)",
    False: "one projection head; pass a module that is no TwoBranchHead",
}


class MethodModel(nn.Module):
    """Combine a backbone with a method's projection head and, if the method has them, prediction head and teacher.

    ``backbone``, ``projection_head``, ``prediction_head`` (None without one), ``teacher_backbone`` and
    ``teacher_projection_head`` (None without a teacher) are submodules. The state dict contains all of them, the second
    moment and W of a computed prediction head as its buffers, and the counters of the loss in ``objective``.

    Args:
        backbone: images ``[B, C, H, W]`` → features ``[B, D]``, or ``[B, D, 1, 1]``; without its classifier.
        input_dim: width of the features. None determines it by passing a black image of 224 pixels through the
            backbone.
        projection_head: a head of your own, ``[B, input_dim] → [B, D]``, such as lightly's; None makes the method's.
        prediction_head: a head of your own, ``[B, D] → [B, D]``; None makes the method's.
        teacher: whether the targets come from a momentum teacher; None is the method's default. Without a teacher the
            targets are the detached projections of the other view.
        gather_distributed: whether the rows of all processes make one batch. True by default, unlike in the losses of
            ``lightly_ext.loss``. It has no effect while no process group is initialised.
        options: options of the method.

    Raises:
        ValueError: an option is unknown or out of range, the backbone ends in a classifier, the method does not have a
            given part, or the widths do not fit.
    """

    spec: ClassVar[MethodSpec]

    def __init__(
        self,
        backbone: nn.Module,
        *,
        input_dim: int | None = None,
        projection_head: nn.Module | None = None,
        prediction_head: nn.Module | None = None,
        teacher: bool | None = None,
        gather_distributed: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        spec = self.spec
        if prediction_head is not None and spec.predictor is None:
            raise ValueError(f"method {spec.name} has no prediction head")
        if teacher and not spec.teacher:
            raise ValueError(f"method {spec.name} has no teacher")
        if (classifier := _classifier(backbone)) is not None:
            raise ValueError(f"backbone ends in a classifier; remove it: backbone.{classifier} = torch.nn.Identity()")
        self.comm = WORLD if gather_distributed else LOCAL
        self.backbone = backbone
        self.feature_dim = _backbone_width(backbone) if input_dim is None else input_dim
        if projection_head is not None:
            width = _width(projection_head, torch.zeros(1, self.feature_dim), "projection_head")
            if options.setdefault(spec.width, width) != width:
                raise ValueError(f"projection_head has {width} output columns, got {spec.width}={options[spec.width]}")
        # a plain dict: the model can be copied and pickled
        self.options = dict(spec.resolve(options))
        if projection_head is not None:
            with torch.device("meta"):
                wanted = type(spec.head(self.feature_dim, self.options))
            if (wanted is TwoBranchHead) != isinstance(projection_head, TwoBranchHead):
                raise ValueError(f"method {spec.name} has {_BRANCHES[wanted is TwoBranchHead]}")
        self.projection_head = projection_head or self._default_head()
        if prediction_head is None and spec.predictor is not None:
            prediction_head = spec.predictor(self.options, self.comm)
        self.prediction_head = prediction_head
        self.teacher_backbone: nn.Module | None = None
        self.teacher_projection_head: nn.Module | None = None
        if spec.teacher if teacher is None else teacher:
            self.teacher_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
            self.teacher_projection_head = copy.deepcopy(self.projection_head).requires_grad_(False)
        self.objective = Objective(spec, self.options, self.comm, self.prediction_head, self.projection_head)

    def _default_head(self) -> nn.Module:
        """Make the method's projection head, for the options of this model."""
        return self.spec.head(self.feature_dim, self.options)

    @property
    def moment(self) -> RunningMoment | None:
        """The running second moment of the embedding, or None if the method does not track it.

        Its eigenvalues are ``moment.spectrum()``.
        """
        return self.objective.tracked_moment(self.prediction_head)

    def forward(self, x: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]) -> Tensor:
        """Compute the features of images, the loss of a list of views, or the joined loss of a list of such lists.

        Wrappers such as DistributedDataParallel call ``forward``: pass the views to them, and they return the loss.

        Args:
            x: images ``[B, C, H, W]``, or one such batch per view, or one list of such batches per micro-batch.

        Returns:
            ``[B, feature_dim]``, or a scalar.
        """
        if isinstance(x, Tensor):
            return self.backbone(x).flatten(start_dim=1)
        return self.loss(x) if isinstance(x[0], Tensor) else self.joined_loss(x)

    def project(self, x: Tensor) -> Tensor:
        """Compute the projections ``[B, D]`` of images."""
        return self.projection_head(self(x))

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        """Compute the method's loss, a scalar. Each view has its own batch statistics.

        Args:
            views: one batch of images per view, as lightly's transforms and collate functions make them. Small crops,
                if the method accepts them, come last.

        Raises:
            ValueError: another number of views than the method's, small crops before large views, or too few rows.
        """
        return self.terms(self.embed(views)[1]).loss

    def joined_loss(self, micro_batches: Sequence[Sequence[Tensor]], *, scale: float = 1.0) -> Tensor:
        """Compute the loss of the joined rows of several micro-batches, with the activations of one at a time.

        It adds the gradients of all micro-batches but the last to the parameters' ``grad``; ``backward`` of the result,
        called once, adds the rest. Therefore call ``zero_grad`` before it, not between. The loss is exact except for
        batch norm, whose statistics are those of each micro-batch. See :class:`plugins.joined.JoinedBatch`.

        Args:
            micro_batches: views, as for ``loss``, of each micro-batch. The numbers of rows may differ.
            scale: ``scaler.get_scale()`` if a GradScaler scales the result.

        Returns:
            The joined loss.

        Raises:
            ValueError: there is no micro-batch, the numbers of views differ, or the network changes its buffers in each
                forward pass.
        """
        if not micro_batches:
            raise ValueError("the joined loss needs at least one micro-batch, got none")
        joined = JoinedBatch(lambda views: (self._encode(views)[1], None), [self.backbone, self.projection_head])
        for views in micro_batches:
            self._add(joined, views, views)
        self._joined_terms(joined, scale)
        return joined.backward()

    def _add(self, joined: JoinedBatch, batch: Any, views: Sequence[Tensor]) -> None:
        """Embed a micro-batch with student and teacher, for the joined loss."""
        large = self._large(views)
        self._begin()
        joined.add(batch, lambda: self._targets(views[:large]))

    def _joined_terms(self, joined: JoinedBatch, scale: float = 1.0) -> tuple[Terms, Embeddings]:
        predict = None if self.prediction_head is None else self._predict
        return joined.terms(self.objective, predict, self.prediction_head, scale=scale)

    def _encode(self, views: Sequence[Tensor]) -> tuple[list[Tensor], Embeddings]:
        """Compute the features of the views, and embeddings without the prediction head."""
        features = [self.backbone(view).flatten(start_dim=1) for view in views]
        return features, embed(features, self.projection_head, large=self._large(views))

    def embed(self, views: Sequence[Tensor]) -> tuple[list[Tensor], Embeddings]:
        """Compute the features of the views and the input of the loss; in training, update a computed predictor."""
        large = self._large(views)
        self._begin()
        features = [self.backbone(view).flatten(start_dim=1) for view in views]
        predict = None if self.prediction_head is None else self._predict
        targets = self._targets(views[:large])
        return features, embed(features, self.projection_head, predict, targets, large=large)

    def _begin(self) -> None:
        """Open an optimizer step if the model has a teacher, because ``update_momentum`` ends the step there."""
        if self.training and self.teacher_backbone is not None:
            self.objective.before_step()

    def terms(self, embeddings: Embeddings) -> Terms:
        """Compute the loss and its terms, a NamedTuple of scalars. Only ``loss`` has a gradient."""
        return self.objective(embeddings)

    def _large(self, views: Sequence[Tensor]) -> int:
        """Count the large views, which come first."""
        if isinstance(views, Tensor):
            raise ValueError(
                f"the loss of {self.spec.name} takes a list of views, got a tensor of shape {tuple(views.shape)}; "
                "pass a list with one batch of images per view, such as [view0, view1]"
            )
        large = large_views([tuple(view.shape[-2:]) for view in views])
        self.spec.check_views(large, len(views) - large)
        return large

    def _predict(self, z: list[Tensor]) -> list[Tensor]:
        if hasattr(self.prediction_head, "predict"):
            return self.prediction_head.predict(z)
        return [self.prediction_head(view) for view in z]  # one of the user's own, such as lightly's

    def _targets(self, views: Sequence[Tensor]) -> list[Tensor] | None:
        if self.teacher_backbone is None:
            return None
        with torch.no_grad():
            return [self.teacher_projection_head(self.teacher_backbone(view).flatten(start_dim=1)) for view in views]

    def training_parameters(self, lr: float | None = None) -> list[Any]:
        """Return the parameters for the optimizer: all except the teacher's.

        Args:
            lr: the learning rate. If it is given, the result is a list of parameter groups with a learning rate each,
                in which the predictor's is multiplied by ``pred_lr_scale``.

        Raises:
            ValueError: ``pred_lr_scale`` is not 1 and ``lr`` is missing.
        """
        scale = self.options.get("pred_lr_scale", 1.0)
        if lr is None and scale != 1.0:
            raise ValueError(
                f"pred_lr_scale={scale:g} needs the learning rate that it multiplies: training_parameters(lr=...)"
            )
        parts = {
            "backbone": self.backbone,
            "projection_head": self.projection_head,
            "prediction_head": self.prediction_head or nn.Identity(),
        }
        trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        if lr is None:
            return [parameter for parameters in trained.values() for parameter in parameters]
        return [
            {"name": name, "params": parameters, "lr": lr * (scale if name == "prediction_head" else 1.0)}
            for name, parameters in trained.items()
            if parameters
        ]

    def before_step(self) -> None:
        """Open an optimizer step: the losses until ``after_step`` are those of its micro-batches."""
        self.objective.before_step()

    def after_step(self) -> None:
        """End the optimizer step. It has no effect if no step is open."""
        self.objective.after_step()

    def update_momentum(self, m: float) -> None:
        """Move the teacher, θ_t ← m θ_t + (1 − m) θ, and end the step. Call it once after each optimizer step.

        Without a teacher it only ends the step.

        Args:
            m: momentum in [0, 1], such as the value of ``lightly.utils.scheduler.cosine_schedule``.
        """
        check_range("m", m, low=0.0, high=1.0)
        teacher = [part for part in (self.teacher_backbone, self.teacher_projection_head) if part is not None]
        update_teacher(teacher, [self.backbone, self.projection_head][: len(teacher)], m)
        self.objective.after_step()


class SSLEYModel(MethodModel):
    """SSL-EY with a projection head whose last layer is a ScaledLinear: SGD does not diverge."""

    def _default_head(self) -> nn.Module:
        return scale_last_layer(super()._default_head())


_BASES = {"ssl_ey": SSLEYModel}


def model_class(name: str, spec: MethodSpec, module: str) -> type[MethodModel]:
    """Make the model class of a MethodSpec.

    Args:
        name: name of the class.
        spec: the method.
        module: dotted name of the module that contains the class.
    """
    options = "\n".join(
        f"        {key}:\n            {option.help} (default: {option.default})."
        for key, option in spec.options.items()
    )
    doc = f"""Implementation of {spec.title} [0].

    - [0] {spec.reference}

    The arguments are those of MethodModel: backbone, input_dim, projection_head, prediction_head, teacher and
    gather_distributed, and as options of the method:

    Attributes:
{options}

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from {module} import {name}
        >>> backbone = resnet18()
        >>> backbone.fc = torch.nn.Identity()
        >>> model = {name}(backbone)
        >>> views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)]
        >>> loss = model.loss(views)
        >>> loss.backward()
        >>> model(views[0]).shape
        torch.Size([4, 512])
    """
    return type(name, (_BASES.get(spec.name, MethodModel),), {"spec": spec, "__doc__": doc, "__module__": module})


def _classifier(backbone: nn.Module) -> str | None:
    """Return the name of a torchvision or timm model's classifier, or None if it has been removed."""
    if not type(backbone).__module__.startswith(("torchvision.models.", "timm.models.")):
        return None
    for name in ("fc", "classifier", "heads", "head"):
        layer = backbone._modules.get(name)
        if isinstance(layer, nn.Sequential) and len(layer):
            layer = layer[-1]
        elif layer is not None and type(layer).__module__.startswith("timm."):
            layer = layer._modules.get("fc")  # pooling and classifier in one
            name = f"{name}.fc"
        if isinstance(layer, nn.Linear):
            return name
    return None


def _backbone_width(backbone: nn.Module) -> int:
    try:
        return _width(backbone, torch.zeros(_PROBE), "backbone")
    except Exception as error:
        raise ValueError(f"backbone cannot process an image of shape {_PROBE} ({error}); give input_dim") from error


@torch.no_grad()
def _width(module: nn.Module, example: Tensor, name: str) -> int:
    """Count the columns of a module's output, in evaluation mode, which leaves its state unchanged."""
    modes = {each: each.training for each in module.modules()}
    parameter = next((p for p in module.parameters() if p.is_floating_point()), example)
    module.eval()
    try:
        output = module(example.to(parameter.device, parameter.dtype))
    finally:
        for each, training in modes.items():
            each.training = training
    if not isinstance(output, Tensor):
        raise ValueError(f"{name} must return a tensor, got {type(output).__name__}")
    return output.flatten(start_dim=1).shape[1]
