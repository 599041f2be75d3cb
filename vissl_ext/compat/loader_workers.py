"""End of a data loader's workers with the process that reads their batches.

torch/utils/data/_utils/worker.py:71 ends a worker when the kernel's parent of the worker ends. With a fork server that
is the server, which ends after its last worker. If the reading process is killed, or stopped while it starts a worker,
server and worker wait for each other forever.
"""

from torch.utils.data._utils import worker

from vissl_ext.locks import end_with_parent


class _Watchdog(worker.ManagerWatchdog):
    """torch's watchdog of a worker, which also ends the worker with the process that reads its batches."""

    def __init__(self) -> None:
        super().__init__()
        end_with_parent()


def activate() -> None:
    """Let each worker of a data loader end with the process that reads its batches."""
    worker.ManagerWatchdog = _Watchdog
