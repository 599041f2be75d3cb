"""Compute the loss of the joined rows of several micro-batches, with the activations of one micro-batch at a time.

The mean of the losses of micro-batches differs from the loss of their joined rows, because the losses in this package
are not means over rows. Gradient caching (Gao et al. 2021, arXiv:2101.06983) computes the joined loss exactly: embed
every micro-batch without gradient, compute the loss of all rows and its gradient with respect to the embeddings, then
embed each micro-batch a second time and backpropagate its rows of that gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from plugins.checks import compute_dtype
from plugins.objective import Objective
from plugins.spec import Embeddings, Terms

ACCUMULATE = ("mean", "joined")
"""Loss of a step with several micro-batches: the mean of their losses, or the loss of their joined rows."""


class _Part(NamedTuple):
    """A micro-batch: its input, the state of the random generators, and its rows."""

    batch: Any
    random: "_RandomState"
    embeddings: Embeddings
    target: list[Tensor] | None


class JoinedBatch:
    """The micro-batches of one optimiser step.

    Call ``add`` for each micro-batch, then ``terms`` once, then ``backward`` once. The result is exact for networks
    that process rows independently. Batch norm uses the statistics of the micro-batch, as with any gradient
    accumulation. Its running statistics are updated once per micro-batch, and dropout draws the same numbers in both
    passes. The images of all micro-batches are kept until ``backward``.

    Args:
        encode: function from a micro-batch to its Embeddings without predictor (``p`` is not read) and a loss to add,
            or None. It is called twice per micro-batch; the first call's loss is ignored.
        encoder: the modules that ``encode`` calls.
    """

    def __init__(self, encode: Callable[[Any], tuple[Embeddings, Tensor | None]], encoder: Iterable[nn.Module]) -> None:
        self.encode = encode
        self.encoder = nn.ModuleList(encoder)
        self.parts: list[_Part] = []
        self._scale = 1.0
        self._terms: Terms | None = None
        self._live: list[Tensor] = []
        self._weights: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Any, target: Callable[[], list[Tensor] | None] = lambda: None) -> None:
        """Embed one micro-batch, without gradient.

        Args:
            batch: the input of ``encode``; kept until ``backward``.
            target: function that returns the teacher's projections of the large views, or None; called once.

        Raises:
            ValueError: the number of views differs from that of the earlier micro-batches.
        """
        random = _RandomState(self.encoder)
        with torch.no_grad():
            embeddings, _ = self.encode(batch)
            part = _Part(batch, random, embeddings, target())
        torch.clear_autocast_cache()  # older torch would give the second pass copies of the weights without gradient
        if self.parts and len(part.embeddings.z) != len(self.parts[0].embeddings.z):
            views = sorted({len(self.parts[0].embeddings.z), len(part.embeddings.z)})
            raise ValueError(f"all micro-batches of a step must have as many views, got {views[0]} and {views[1]}")
        self.parts.append(part)

    def terms(
        self,
        objective: Objective,
        predict: Callable[[list[Tensor]], list[Tensor]] | None,
        predictor: nn.Module | None,
        *,
        scale: float = 1.0,
    ) -> tuple[Terms, Embeddings]:
        """Compute the loss of the joined rows.

        Args:
            objective: the method's objective.
            predict: function from the projections of all views to their predictions; None if p = z.
            predictor: the module behind ``predict``, for its parameters.
            scale: factor by which a GradScaler multiplies the loss.

        Returns:
            The terms, whose gradient is handled by this object, and the joined embeddings.
        """
        z = _joined([part.embeddings.z for part in self.parts])
        features = _joined([list(part.embeddings.features) for part in self.parts])
        given = [part.target for part in self.parts if part.target is not None]
        flat = _joined([[map_ for view in part.embeddings.maps for map_ in view] for part in self.parts])
        remaining = iter(flat)
        maps = [tuple(next(remaining) for _ in view) for view in self.parts[0].embeddings.maps]
        if features:  # a second branch makes the targets, with gradient
            target = _joined([part.embeddings.target for part in self.parts])
        else:
            large = len(self.parts[0].embeddings.target)
            target = _joined(given) if given else [view.detach() for view in z[:large]]
        self._live = [view.requires_grad_() for view in (*z, *(target if features else []), *flat)]
        indexes = [part.embeddings.index for part in self.parts if part.embeddings.index is not None]
        index = torch.cat(indexes) if indexes else None
        backbone = _joined([list(part.embeddings.backbone) for part in self.parts])
        embeddings = Embeddings(z, z if predict is None else predict(z), target, features, index, maps, backbone)
        self._terms = terms = objective(embeddings)
        if not torch.is_grad_enabled():
            return terms, embeddings
        owned = [p for module in (predictor, objective) if module is not None for p in module.parameters()]
        owned = [parameter for parameter in owned if parameter.requires_grad]
        with torch.autocast(z[0].device.type, enabled=False):
            found = torch.autograd.grad(terms.loss * scale, [*self._live, *owned], allow_unused=True)
        pairs = zip([*self._live, *owned], found, strict=True)
        gradients = [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in pairs]
        self._live = gradients[: len(self._live)]
        self._weights = list(zip(owned, gradients[len(self._live) :], strict=True))
        self._scale = scale
        return terms, embeddings

    def backward(self) -> Tensor:
        """Accumulate the gradients of all micro-batches except the last one.

        Returns:
            A scalar: the joined loss plus the mean over rows of the micro-batches' own losses. Its backward adds the
            remaining gradients, those of the last micro-batch and of the predictor. With DistributedDataParallel only
            this backward communicates, and it reduces the accumulated sum.
        """
        assert self._terms is not None, "terms comes first"
        if not torch.is_grad_enabled():
            return self._terms.loss
        rows = [len(part.embeddings.z[0]) for part in self.parts]
        of_parts = zip(*(gradient.split(rows) for gradient in self._live), strict=True)
        surrogate, value = torch.zeros(()), self._terms.loss.detach()
        for count, part, gradients in zip(rows, self.parts, of_parts, strict=True):
            with part.random.again(), _statistics_kept(self.encoder):
                embeddings, own = self.encode(part.batch)
            maps = [map_ for view in embeddings.maps for map_ in view]
            live = [*embeddings.z, *(embeddings.target if embeddings.features else []), *maps]
            if own is not None:
                own = own * (count / sum(rows))
                value = value + own.detach()
            if part is not self.parts[-1]:
                with torch.autocast(value.device.type, enabled=False):
                    gradients = [gradient.to(tensor) for gradient, tensor in zip(gradients, live, strict=True)]
                    more = [] if own is None or not own.requires_grad else [own * self._scale]
                    torch.autograd.backward([*live, *more], [*gradients, *(torch.ones_like(loss) for loss in more)])
                torch.clear_autocast_cache()
                continue
            pairs = [*zip(live, gradients, strict=True), *self._weights]
            products = [(tensor.to(gradient) * (gradient / self._scale)).sum() for tensor, gradient in pairs]
            surrogate = torch.stack([product.to(value) for product in products]).sum() + (0 if own is None else own)
        self.parts, self._live, self._weights, self._terms = [], [], [], None
        return value + (surrogate - surrogate.detach())


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Concatenate the rows of each view over all micro-batches, in the dtype of the loss computation."""
    views = [torch.cat(list(view)) for view in zip(*parts, strict=True)]
    return [view.to(compute_dtype(view.dtype)) for view in views]


class _RandomState:
    """States of torch's random generators on the CPU and on the encoder's devices."""

    def __init__(self, encoder: nn.Module) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*encoder.parameters())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore the states within the context, and the present states after it."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


@contextmanager
def _statistics_kept(encoder: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics, which the first pass has already updated, while it uses batch statistics.

    Raises:
        ValueError: another module changed its buffers, so that the second pass gives a different result.
    """
    norms = [
        module
        for module in encoder.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    before = {name: buffer._version for name, buffer in encoder.named_buffers()}
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
    for name, buffer in encoder.named_buffers():
        if buffer._version != before.get(name, buffer._version):
            raise ValueError(
                f"the joined loss embeds each micro-batch twice, but the network changes {name} each time; "
                "accumulate the mean of the losses, or remove the module"
            )
