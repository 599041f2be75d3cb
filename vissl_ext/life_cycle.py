"""The life cycle of a method in VISSL: positions of images, epochs, steps, frozen and re-initialised layers."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from classy_vision.tasks.classification_task import AmpType
from torch import Tensor, nn
from vissl.data.ssl_transforms import get_transform

from plugins.distributed import WORLD, Collective
from plugins.draws import draw_seed
from plugins.tools.command import UserError
from plugins.tools.feed import WholeSet
from vissl_ext.methods import MethodLoss
from vissl_ext.silent_hook import SilentHook


class LifeCycleHook(SilentHook):
    """Call the life cycle of :class:`plugins.objective.Objective`, except for ``after_step``.

    ``EMATeacherHook`` calls ``after_step``, which also updates the teacher. This hook must precede VISSL's hook that
    clips gradients, which uses those of frozen parameters otherwise.
    """

    def on_start(self, task: Any) -> None:
        """Make each forward pass of the model in training mode start a step, before the trunk and the head run."""
        loss = task.base_loss
        if isinstance(loss, MethodLoss):

            def open_step(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                if module.training:
                    loss.objective.before_step()

            task.base_model.register_forward_pre_hook(open_step)

    def on_phase_start(self, task: Any) -> None:
        """Start an epoch, and drop the optimiser's state of parameters that have been initialised anew.

        An epoch may have several phases. A run that resumes within an epoch has started it before.
        """
        loss = task.base_loss
        if not (isinstance(loss, MethodLoss) and task.train):
            return
        if task.epoch == task.started_epoch:
            loss.clock.epoch = task.epoch
            return
        for parameter in loss.objective.start_epoch(task.epoch, feed(task)):
            task.optimizer.optimizer.state.pop(parameter, None)
        task.started_epoch = task.epoch

    def on_forward(self, task: Any) -> None:
        """Pass the positions of the batch's images in the training set to the loss."""
        if isinstance(task.base_loss, MethodLoss):
            task.base_loss.set_index(task.last_batch.sample)

    def on_backward(self, task: Any) -> None:
        """Average the gradients of the loss's parameters over the processes, and freeze parameters.

        DistributedDataParallel has averaged those of the model by then. All gradients still have the loss scale of AMP.
        """
        if isinstance(task.base_loss, MethodLoss):
            average_gradients(task.base_loss.objective.criterion.parameters())
            task.base_loss.objective.after_backward()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], comm: Collective = WORLD) -> None:
    """Average gradients over the processes, as DistributedDataParallel does, with one collective operation.

    Args:
        parameters: the same on all processes. One without a gradient counts as zero; if no process has its gradient, it
            stays None.
        comm: the processes.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if comm.size == 1 or not trained:
        return
    present = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = comm.sum(torch.cat([*(gradient.flatten() for gradient in gradients), present.to(gradients[0].dtype)]))
    *means, counts = total.split([*(parameter.numel() for parameter in trained), len(trained)])
    for parameter, mean, count in zip(trained, means, counts.tolist(), strict=True):
        if count:
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) / comm.size


def feed(task: Any) -> WholeSet:
    """Return the pass over the training set of a task, :class:`plugins.clock.Feed`.

    The "train" view has the transforms of DATA.TRAIN, of which it yields the large views; the "eval" view has those of
    DATA.TEST.
    """
    train, model = task.datasets["train"], task.base_model

    def evaluated() -> Any:
        entries = task.config.DATA.TEST.TRANSFORMS
        if not entries:
            raise UserError(
                f"config.LOSS.name={task.config.LOSS.name} reads the training images with the transforms of the "
                "evaluation: set config.DATA.TEST.TRANSFORMS, for example to Resize, ToTensor, Normalize"
            )
        dataset = copy.copy(train)  # reads the same images
        dataset.transform = get_transform(copy.deepcopy(entries))
        return dataset

    def encode(views: list[Tensor]) -> list[Tensor]:
        with torch.autocast(task.device.type) if task.amp_type == AmpType.PYTORCH else nullcontext():
            return [model.features(view).float() for view in views]

    data = task.config.DATA
    return WholeSet(
        {"train": lambda: train, "eval": evaluated},
        partial(first_views, count=task.base_loss.large),
        encode,
        [model.trunk],
        batch_size=data.TRAIN.BATCHSIZE_PER_REPLICA,
        workers=data.NUM_DATALOADER_WORKERS,
        device=task.device,
        seed=draw_seed(task.config.SEED_VALUE, task.epoch),
    )


def first_views(item: Mapping[str, Any], count: int) -> list[Tensor]:
    """Return the first views of an item of VISSL's data set."""
    return item["data"][:count]
