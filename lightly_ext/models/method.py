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

Methods that remember each image, pass over the training set at the start of an epoch, or freeze parameters need more of
a loop; with it a loop runs every method::

    dataset = IndexedDataset(images)  # of lightly_ext.data
    model = SomeMethod(backbone, num_samples=len(dataset))
    for epoch in range(epochs):
        model.start_epoch(epoch, dataloader, optimizer)
        for views, labels, index in dataloader:
            loss = model.loss(views, index)
            optimizer.zero_grad()
            loss.backward()
            model.after_backward()
            optimizer.step()
            model.update_momentum(tau)
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightly_ext.data import positions, whole_set
from lightly_ext.models.modules.heads import scale_last_layer
from lightly_ext.names import CLASS_NAMES
from plugins.checks import check_range
from plugins.clock import Feed
from plugins.distributed import LOCAL, WORLD
from plugins.draws import draw_seed
from plugins.heads import StackHead, TwoBranchHead
from plugins.joined import JoinedBatch
from plugins.modes import in_mode
from plugins.objective import (
    Objective,
    connect,
    embed,
    encode,
    encode_image,
    encode_views,
    project,
)
from plugins.predictors import RunningMoment
from plugins.spec import Embeddings, Hints, MethodSpec, Terms, large_views

_SIDES = (224, 128, 64, 32)
"""Sides of the images that determine the width of the features, in pixels: the first that the backbone can process."""
_PARTS = {"projector": "projection_head", "predictor": "prediction_head", "loss": "loss"}
"""Part of a method in the names of its hints → lightly's name of it."""
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
        scaled_head: whether the last layer of the method's own projection head is a ScaledLinear if the loss of the
            method grows with the scale of the embedding, as SSL-EY's does. False leaves it an ordinary Linear, as in
            solo-learn and VISSL; then use LARS or AdamW.
        gather_distributed: whether the rows of all processes make one batch. True by default, unlike in the losses of
            ``lightly_ext.loss``. It has no effect while no process group is initialised.
        num_samples: number of training images. Methods with a memory of each image need it; a state dict or
            ``allocate`` can give it later.
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
        scaled_head: bool = True,
        gather_distributed: bool = True,
        num_samples: int | None = None,
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
        if projection_head is not None and spec.width is not None:
            width = _width(projection_head, torch.zeros(1, self.feature_dim), "projection_head")
            if options.setdefault(spec.width, width) != width:
                raise ValueError(f"projection_head has {width} output columns, got {spec.width}={options[spec.width]}")
        # a plain dict: the model can be copied and pickled
        self.options = dict(spec.resolve(options))
        spec.prepare(self.options, self.backbone)
        if projection_head is not None:
            with torch.device("meta"):
                wanted = type(spec.head(self.feature_dim, self.options))
            if (wanted is TwoBranchHead) != isinstance(projection_head, TwoBranchHead):
                raise ValueError(f"method {spec.name} has {_BRANCHES[wanted is TwoBranchHead]}")
            if issubclass(wanted, StackHead) and not isinstance(projection_head, StackHead):
                raise ValueError(
                    f"method {spec.name} compares patches: projection_head must be a plugins.heads.StackHead, such as "
                    f"{wanted.__name__}, got a {type(projection_head).__name__}"
                )
        spec = replace(spec, hints=_hints_of(spec, self.options, projection_head, prediction_head))
        self.taps = spec.taps(self.options)
        self.projection_head = projection_head or self._default_head(scaled_head)
        connect(self.projection_head, self.backbone, self.taps)
        if prediction_head is None and spec.predictor is not None:
            prediction_head = spec.predictor(self.options, self.comm)
        self.prediction_head = prediction_head
        self.teacher_backbone: nn.Module | None = None
        self.teacher_projection_head: nn.Module | None = None
        if spec.teacher if teacher is None else teacher:
            self.teacher_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
            self.teacher_projection_head = copy.deepcopy(self.projection_head).requires_grad_(False)
            if spec.teacher_init is not None:
                spec.teacher_init(self.teacher_projection_head)
        self.objective = Objective(spec, self.options, self.comm, self.prediction_head, self.projection_head)
        self.num_samples: int | None = None
        if num_samples is not None:
            self.allocate(num_samples)

    def _default_head(self, scaled: bool) -> nn.Module:
        """Make the method's projection head. If the loss is unbounded, its last layer can be a ScaledLinear."""
        head = self.spec.head(self.feature_dim, self.options)
        return scale_last_layer(head) if scaled and self.spec.unbounded else head

    @property
    def moment(self) -> RunningMoment | None:
        """The running second moment of the embedding, or None if the method does not track it.

        Its eigenvalues are ``moment.spectrum()``.
        """
        return self.objective.tracked_moment(self.prediction_head)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names that DistributedDataParallel leaves alone: the state of the objective is identical on all processes.

        Otherwise it would broadcast a memory of images in each forward pass.
        """
        return [f"objective.{name}" for name, _ in self.objective.named_buffers()]

    def allocate(self, num_samples: int) -> None:
        """Allocate the memory of images, if the method has one. A memory that a state dict has filled is kept.

        Args:
            num_samples: number of training images.

        Raises:
            ValueError: the memory holds another number of images.
        """
        self.objective.allocate(num_samples)
        self.num_samples = num_samples

    def forward(
        self, x: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]], index: Tensor | Sequence[Tensor] | None = None
    ) -> Tensor:
        """Compute the features of images, the loss of a list of views, or the joined loss of a list of such lists.

        Wrappers such as DistributedDataParallel call ``forward``: pass the views to them, and they return the loss.

        Args:
            x: images ``[B, C, H, W]``, or one such batch per view, or one list of such batches per micro-batch. The
                features of a stack of patches ``[B, P, C, h, w]`` are the mean over the patches of each image. With the
                option ``eval_input="patches"`` a model in evaluation mode cuts images into patches.
            index: of ``loss`` or ``joined_loss``.

        Returns:
            ``[B, feature_dim]``, or a scalar.
        """
        if isinstance(x, Tensor):
            patches = None if self.training or x.ndim == 5 else self.spec.eval_patches(self.options)
            return whole(encode(self.backbone, x)) if patches is None else encode_image(self.backbone, x, patches)
        return self.loss(x, index) if isinstance(x[0], Tensor) else self.joined_loss(x, index)

    def project(self, x: Tensor) -> Tensor:
        """Compute the projections ``[B, D]`` of images."""
        return self.projection_head(self(x))

    def loss(self, views: Sequence[Tensor], index: Tensor | None = None) -> Tensor:
        """Compute the method's loss, a scalar. Each view has its own batch statistics.

        Args:
            views: one batch of images per view, as lightly's transforms and collate functions make them. Small crops
                come after the large views, and stacks of patches ``[B, P, C, h, w]`` come last.
            index: position of each image in the training set, ``[B]``, the third element of an IndexedDataset's
                batches. Only methods with a memory of each image read it.

        Raises:
            ValueError: another number of views than the method's, small crops before large views, too few rows, or a
                method with a memory has no ``index`` or no ``num_samples``.
        """
        return self.terms(self.embed(views, index)[1]).loss

    def joined_loss(
        self,
        micro_batches: Sequence[Sequence[Tensor]],
        index: Sequence[Tensor] | None = None,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        """Compute the loss of the joined rows of several micro-batches, with the activations of one at a time.

        It adds the gradients of all micro-batches but the last to the parameters' ``grad``; ``backward`` of the result,
        called once, adds the rest. Therefore call ``zero_grad`` before it, not between. The loss is exact except for
        batch norm, whose statistics are those of each micro-batch. See :class:`plugins.joined.JoinedBatch`.

        Args:
            micro_batches: views, as for ``loss``, of each micro-batch. The numbers of rows may differ.
            index: as for ``loss``, of each micro-batch.
            scale: ``scaler.get_scale()`` if a GradScaler scales the result.

        Returns:
            The joined loss.

        Raises:
            ValueError: there is no micro-batch, the numbers of views differ, the network changes its buffers in each
                forward pass, or what ``loss`` does not accept.
        """
        if not micro_batches:
            raise ValueError("the joined loss needs at least one micro-batch, got none")
        indexes = [None] * len(micro_batches) if index is None else index
        if len(indexes) != len(micro_batches):
            raise ValueError(f"index needs an entry for each of {len(micro_batches)} micro-batches, got {len(indexes)}")
        joined = JoinedBatch(lambda batch: (self._encode(*batch)[1], None), [self.backbone, self.projection_head])
        for views, of_views in zip(micro_batches, indexes, strict=True):
            self._add(joined, (views, of_views), views)
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

    def _encode(self, views: Sequence[Tensor], index: Any = None) -> tuple[list[Tensor], Embeddings]:
        """Compute the features of the views, and embeddings without the prediction head."""
        large, places = self._large(views), self._positions(views, index)
        features, maps = encode_views(self.backbone, views, self.taps)
        return features, embed(features, self.projection_head, large=large, index=places, maps=maps)

    def embed(self, views: Sequence[Tensor], index: Tensor | None = None) -> tuple[list[Tensor], Embeddings]:
        """Compute the features of the views and the input of the loss; in training, update a computed predictor.

        Args:
            views: as for ``loss``.
            index: as for ``loss``.

        Returns:
            The features ``[B, feature_dim]`` of each view, ``[B, P, feature_dim]`` of a stack, and the embeddings.
        """
        large, places = self._large(views), self._positions(views, index)
        self._begin()
        features, maps = encode_views(self.backbone, views, self.taps)
        predict = None if self.prediction_head is None else self._predict
        targets = self._targets(views[:large])
        return features, embed(features, self.projection_head, predict, targets, large=large, index=places, maps=maps)

    def _begin(self) -> None:
        """Open an optimizer step if the model has a teacher, because ``update_momentum`` ends the step there."""
        if self.training and self.teacher_backbone is not None:
            self.objective.before_step()

    def terms(self, embeddings: Embeddings) -> Terms:
        """Compute the loss and its terms, a NamedTuple of scalars. Only ``loss`` has a gradient."""
        return self.objective(embeddings)

    def _large(self, views: Sequence[Tensor]) -> int:
        """Count the large views, which come first. Stacks of patches come last."""
        if isinstance(views, Tensor):
            raise ValueError(
                f"the loss of {self.spec.name} takes a list of views, got a tensor of shape {tuple(views.shape)}; "
                "pass a list with one batch of images per view, such as [view0, view1]"
            )
        stacks = sum(view.ndim == 5 for view in views)
        single = views[: len(views) - stacks]
        if any(view.ndim == 5 for view in single):
            shapes = [tuple(view.shape) for view in views]
            raise ValueError(f"stacks of patches [B, P, C, h, w] come after all other views, got shapes {shapes}")
        large = large_views([tuple(view.shape[-2:]) for view in single]) if single else 0
        try:
            self.spec.check_views(large, len(single) - large, stacks)
        except ValueError as error:
            name = next((name for name, spec in CLASS_NAMES.items() if spec is self.spec), None)
            advice = f"; use lightly_ext.transforms.{name}Transform" if name and self.spec.stacks else ""
            raise ValueError(f"{error}{advice}") from None
        return large

    def _positions(self, views: Sequence[Tensor], index: Any) -> Tensor | None:
        """Check the positions of the images in the training set; None if the method does not read them."""
        if not self.spec.indexed:
            return None
        if index is None:
            raise ValueError(
                f"method {self.spec.name} remembers each image and needs its position in the training set: wrap the "
                "data set in lightly_ext.data.IndexedDataset, and call loss(views, index)"
            )
        if self.num_samples is None and any(not buffer.numel() for buffer in self.objective.buffers()):
            raise ValueError(
                f"method {self.spec.name} remembers each image and needs the number of training images: "
                "make the model with num_samples=len(dataset)"
            )
        return positions(index, len(views[0]), self.num_samples, views[0].device)

    def _predict(self, z: list[Tensor]) -> list[Tensor]:
        if hasattr(self.prediction_head, "predict"):
            return self.prediction_head.predict(z)
        return [self.prediction_head(view) for view in z]  # one of the user's own, such as lightly's

    def _targets(self, views: Sequence[Tensor]) -> list[Tensor] | None:
        if self.teacher_backbone is None:
            return None
        with torch.no_grad():
            return project(self.teacher_projection_head, [encode(self.teacher_backbone, view) for view in views])

    def training_parameters(self, lr: float | None = None) -> list[Any]:
        """Return the parameters for the optimizer: all except the teacher's.

        Args:
            lr: the learning rate. If it is given, the result is a list of parameter groups with a learning rate each,
                and with what the method wants for some of its parameters: another learning rate, ``momentum`` or
                ``weight_decay`` 0, and ``keep_lr`` where the learning rate should not follow a schedule. None returns
                the parameters alone, for an optimizer that treats them alike.

        Raises:
            ValueError: the method scales the learning rate of some parameters and ``lr`` is missing.
        """
        groups = self._groups()
        if lr is None:
            for name, _, hints in groups:
                if hints.lr_scale != 1.0:
                    raise ValueError(
                        f"method {self.spec.name} multiplies the learning rate of {name} by {hints.lr_scale:g} and "
                        "needs the learning rate: training_parameters(lr=...)"
                    )
            return [parameter for _, parameters, _ in groups for parameter in parameters]
        return [
            {"name": name, "params": parameters, "lr": lr * hints.lr_scale, **hints.group_options(), **_marks(hints)}
            for name, parameters, hints in groups
        ]

    def _groups(self) -> list[tuple[str, list[nn.Parameter], Hints]]:
        """Return the trained parameters by the hints of the method, under lightly's names of the parts."""
        found = [("backbone", [p for p in self.backbone.parameters() if p.requires_grad], Hints())]
        for group in self.objective.groups:
            part, dot, rest = group.name.partition(".")
            found.append((f"{_PARTS[part]}{dot}{rest}", [*group.parameters.values()], group.hints))
        return [group for group in found if group[1]]

    def start_epoch(
        self,
        epoch: int,
        data: DataLoader | Feed | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Start an epoch. Methods that pass over the training set, or freeze parameters for epochs, need it.

        Args:
            epoch: number of the epoch, from 0.
            data: the data loader of the training, whose data set the method passes over in its own order, or a function
                that makes such a pass, see :class:`plugins.clock.Feed`.
            optimizer: its state of the parameters that the method initialises anew is dropped.

        Raises:
            ValueError: the method initialises parameters anew and ``optimizer`` is missing, or the method needs images
                without augmentation that the data set does not have, see ``lightly_ext.data.IndexedDataset``.
        """
        feed: Any = data
        if hasattr(data, "dataset"):
            feed = whole_set(data, self._features, [self.backbone], self.comm, draw_seed(torch.initial_seed(), epoch))
        fresh = self.objective.start_epoch(epoch, feed)
        if fresh and optimizer is None:
            raise ValueError(
                f"method {self.spec.name} initialises parameters anew at the start of an epoch: "
                "call start_epoch(epoch, dataloader, optimizer)"
            )
        for parameter in fresh:
            optimizer.state.pop(parameter, None)

    def _features(self, views: list[Tensor]) -> list[Tensor]:
        """Compute the features of the views of a pass over the training set."""
        dtype = next(parameter.dtype for parameter in self.backbone.parameters())
        return [encode(self.backbone, view.to(dtype)) for view in views]

    def before_step(self) -> None:
        """Open an optimizer step: the losses until ``after_step`` are those of its micro-batches."""
        self.objective.before_step()

    def after_backward(self) -> None:
        """Freeze parameters. Call it between ``backward`` and ``optimizer.step()``; it does nothing for most methods.

        A frozen parameter has no gradient, so that the optimizer does not change it or its state.
        """
        self.objective.after_backward()

    def epoch_quality(self) -> dict[str, Tensor]:
        """Return the quality of features and projections since the last call. Call it once an epoch, on all processes.

        It needs the option ``log_quality``; see :meth:`plugins.objective.Objective.epoch_quality`.
        """
        return self.objective.epoch_quality()

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
        self.objective.set_teacher(teacher, [self.backbone, self.projection_head][: len(teacher)])
        self.objective.after_step(m)


def _hints_of(
    spec: MethodSpec, options: Mapping[str, Any], projector: nn.Module | None, predictor: nn.Module | None
) -> Callable[[Any], Mapping[str, Hints]]:
    """Return the hints of a method without those for parts that the user's own heads do not have, with a warning."""
    hints = dict(spec.hints(options))
    for name, head in {"projector": projector, "predictor": predictor}.items():
        names = [] if head is None else [f"{name}.{path}." for path, _ in head.named_parameters()]
        for key in [key for key in hints if key.startswith(f"{name}.") and names]:
            if not any(path.startswith(f"{key}.") for path in names):
                part = key.removeprefix(f"{name}.")
                warnings.warn(
                    f"{_PARTS[name]} has no part {part}, which method {spec.name} trains differently: {hints.pop(key)}",
                    stacklevel=3,
                )
    return lambda _: hints


def whole(features: Tensor) -> Tensor:
    """Return the features of each image, ``[B, F]``: the mean over the patches of a stack, ``[B, P, F]``."""
    return features.mean(1) if features.ndim == 3 else features


def _marks(hints: Hints) -> dict[str, bool]:
    return {"keep_lr": True} if hints.lr_constant else {}


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
    sized, index = (", num_samples=50000", ", torch.arange(4)") if spec.indexed else ("", "")
    images = ", ".join(["torch.randn(4, 3, 32, 32)"] * (spec.views or (1 if spec.only_stacks else 2)))
    hints = spec.hints(spec.resolve({})).values()
    epoch = "\n        >>> model.start_epoch(0)" if any(hint.frozen_epochs for hint in hints) else ""
    step = f"""{epoch}
        >>> loss = model.loss(views{index})
        >>> loss.backward()"""
    doc = f"""Implementation of {spec.title} [0].

    - [0] {spec.reference}

    The arguments are those of MethodModel: backbone, input_dim, projection_head, prediction_head, teacher,
    gather_distributed and num_samples, and as options of the method:

    Attributes:
{options}

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from {module} import {name}
        >>> backbone = resnet18()
        >>> backbone.fc = torch.nn.Identity()
        >>> model = {name}(backbone{sized})
        >>> views = [{images}]{"" if spec.stacks else step}
        >>> model(views[0]).shape
        torch.Size([4, 512])
    """
    return type(name, (MethodModel,), {"spec": spec, "__doc__": doc, "__module__": module})


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
    reason: Exception | None = None
    for side in _SIDES:
        try:
            return _width(backbone, torch.zeros(1, 3, side, side), "backbone")
        except Exception as error:
            reason = reason or error
    shape = (1, 3, _SIDES[0], _SIDES[0])
    raise ValueError(f"backbone cannot process an image of shape {shape} ({reason}); give input_dim") from reason


@torch.no_grad()
def _width(module: nn.Module, example: Tensor, name: str) -> int:
    """Count the columns of a module's output, in evaluation mode, which leaves its state unchanged."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), example)
    with in_mode(False, module):
        output = module(example.to(parameter.device, parameter.dtype))
    if not isinstance(output, Tensor):
        raise ValueError(f"{name} must return a tensor, got {type(output).__name__}")
    return output.flatten(start_dim=1).shape[1]
