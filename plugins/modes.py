"""The mode of networks, training or evaluation, for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(training: bool, *networks: nn.Module) -> Iterator[None]:
    """Set the mode of networks within the block, and restore that of each of their modules at its end.

    Args:
        training: True for the training mode, False for the evaluation mode.
        networks: the networks.

    >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with in_mode(False, network):
    ...     network[0].training
    False
    >>> [module.training for module in network]
    [True, False]
    """
    before = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode
