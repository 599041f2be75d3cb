"""Published accuracies, for the tables of the suites. Numbers that could not be found in their source are omitted."""

from typing import NamedTuple


class Published(NamedTuple):
    """Accuracies in per cent.

    Args:
        top1, top5: accuracy of a linear classifier on the frozen backbone.
        source: where the numbers were published.
    """

    top1: float
    top5: float | None
    source: str


_THESIS = "the author's tables, one run each: Chapman, ResNet-18, 1000 epochs, batches of 256"
_DISSL = (
    "README of the authors' TinyImageNet code of arXiv:2209.06235, one seed, weight decay chosen on the test images"
)


def _table(names: str, top1: tuple[float, ...]) -> dict[str, Published]:
    rows = zip(names.split(), top1, strict=True)
    return {f"{name}_tinyimagenet": Published(accuracy, None, _DISSL) for name, accuracy in rows}


PUBLISHED: dict[str, dict[str, Published]] = {
    "ssl_ey": {
        "ssl_ey_cifar10": Published(91.43, 99.75, _THESIS),
        "ssl_ey_cifar100": Published(67.52, 90.17, _THESIS),
        "ssl_ey-no-projector_cifar10": Published(90.98, 99.69, _THESIS),
        "ssl_ey-no-projector_cifar100": Published(65.21, 88.09, _THESIS),
    },
    "dissl_table1_contrastive": _table("simclr cissl cissl-dim cissl-epochs cissl-aug", (45.2, 45.8, 47.6, 48.7, 51.2)),
    "dissl_table1_distillation": _table("dino dissl dissl-dim dissl-epochs dissl-aug", (43.3, 45.1, 48.0, 49.0, 50.7)),
    "matrix_ssl": {
        "mec-e100_imagenet": Published(70.8, None, "best epoch of the ResNet-50 that MEC's authors released")
    },
    # the table of arXiv:2212.04858 could not be retrieved
    "implicit_var_reg": {},
}
"""Suite → run, as ``<method>_<data set>`` → its published accuracy."""

MEASURED: dict[str, dict[str, float]] = {}
"""Suite → run → our top-1 accuracy (%), for runs with the full number of epochs."""

BEST_ON_TEST: dict[str, float] = {
    "byol": 80.09,
    "relic": 79.26,
    "simclr": 77.79,
    "swav": 72.11,
    "moco": 63.14,
    "barlow": 56.81,
}
"""Algorithm → the "KNN accuracy" (%) on CIFAR-10 that Self-Supervised-Vision publishes."""
BEST_ON_TEST_SOURCE = (
    'the "KNN accuracy" in the README of Self-Supervised-Vision, for a network that it does not name: the neighbour '
    "consistency of the head's output in training mode, the best of all evaluations on the test images"
)
