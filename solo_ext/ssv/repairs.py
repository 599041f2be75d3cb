"""Where a run differs from the original on purpose: the faults of its code, and what is done instead."""

from collections.abc import Mapping

from solo_ext.ssv.grammar import ADDED

_TEACHER = "the teacher begins as a copy of the student; the original's was another random network"
REPAIRS: Mapping[str, tuple[str, ...]] = {
    "simclr": (),
    "moco": ("the queue begins with random rows of unit length; the original's began with zeros",),
    "byol": (
        _TEACHER,
        "the momentum of the teacher rises over the whole run; the original's stayed at its first value",
    ),
    "dino": (
        "a view of the student predicts the teacher's other views of its image; the original mixed rows of images",
        "views are cut from the image, once; the original cut two sets of them from two augmented images",
        f"{_TEACHER}, and it moves after each step; the original's moved after each epoch",
        "the centre begins at 0; the original's was random",
    ),
    "pirl": (
        "image and patches are compared with the negatives; the original compared rows of the memory, "
        "so that negatives had no gradient",
        "rows of the memory keep unit length, and the order of the patches is drawn for each image",
    ),
    "barlow": ("variance and correlation are both means over the batch; the original divided them by N - 1 and N",),
    "simsiam": (
        "targets are the network's own projections, without gradient; the original's were those of another random "
        "network, which was never trained",
    ),
    "relic": (
        "the invariance is the divergence of the two distributions over the batch; the original took a softmax over "
        "the positives of the batch, and its divergence could be negative",
        _TEACHER,
        "the momentum of the teacher rises over the whole run; the original's stayed at its first value",
    ),
    "deep_cluster": (
        "all training images are clustered before each epoch, and the classifier begins anew; the original stopped "
        "with an error when it assigned the labels",
    ),
    "swav": ("earlier rows, of each view its own, take part in the codes only; the original also had a loss of them",),
    "sela": (
        "labels are made for the whole training set and for each head, with classes of equal size, and belong to their "
        "images; the original's were made for each batch, of one class, and were assigned to other images",
    ),
    **dict.fromkeys(ADDED, ("the original names this algorithm but has no code of it; the settings are ours",)),
}
"""Algorithm → one sentence for each fault of the original that a run of ours does not have."""
KEPT: Mapping[str, tuple[str, ...]] = {
    "byol": ("the loss is the mean over the columns of the embedding, 1 / proj_dim of the paper's: lr belongs to it",),
    "swav": ("the loss has the factor batch / (batch + feature_bank_size) of the original's mean: lr belongs to it",),
    "sela": ("the loss is the sum over the heads: lr belongs to it",),
    "barlow": ("the head normalises rows before the loss standardises columns, which the paper's does not",),
}
"""Algorithm → one sentence for each setting of the original that differs from the paper and is kept."""


def announcements(algo: str) -> list[str]:
    """Return the lines that a run prints at its start.

    >>> announcements("simclr")
    []
    """
    repaired = [f"repaired: {sentence}" for sentence in REPAIRS[algo]]
    return repaired + [f"kept: {sentence}" for sentence in KEPT.get(algo, ())]
