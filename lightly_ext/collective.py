"""``gather_distributed`` of lightly's losses as the Collective of ours."""

from torch import distributed as dist

from plugins.distributed import LOCAL, WORLD, Collective


def collective(gather_distributed: bool) -> Collective:
    """Return the processes that share the batch: all of them, or this one alone.

    Args:
        gather_distributed: whether the rows of all processes make one batch. It has no effect while no process group is
            initialised.

    Raises:
        ValueError: ``gather_distributed`` is True, but torch was built without torch.distributed.
    """
    if gather_distributed and not dist.is_available():
        raise ValueError(
            "gather_distributed is True but this torch was built without torch.distributed; set it to False"
        )
    return WORLD if gather_distributed else LOCAL
