"""SeLa: predict labels that were made for the whole training set, with as many images in each class.

Asano, Rupprecht & Vedaldi, "Self-labelling via simultaneous clustering and representation learning" (ICLR 2020,
arXiv:1911.05371), eq. 6, with several heads as in its section 3.3. The published code sums over the heads' losses in
the CIFAR script and averages them in the ImageNet script; this is the average.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import check_result, check_rows, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import labelled_mean


class SeLaTerms(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    """In nats; log K if all logits are equal."""
    agreement: Float[Tensor, ""]
    """Share of the labels that have the largest logit, in [0, 1]."""


def sela_loss(
    logits: Float[Tensor, "B H*K"], labels: Int64[Tensor, "H B"], *, comm: Collective = LOCAL
) -> Float[Tensor, ""]:
    """Mean over heads of the mean over rows i of ``-log softmax(logits_i)[label_i]``.

    Args:
        logits: outputs of H heads with K classes, head after head in each row.
        labels: classes in [0, K), for each head; -100 leaves a row out.
        comm: the processes that share the batch. They exchange H + 1 sums; backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input); 0 for a head without labels.

    Raises:
        ValueError: a shape or dtype is wrong, or (on the CPU) a logit is NaN or inf.

    Reference:
        arXiv:1911.05371, eq. 6.

    >>> round(sela_loss(torch.zeros(3, 2 * 5), torch.zeros(2, 3, dtype=torch.int64)).item(), 5)  # log 5
    1.60944
    """
    return sela_terms(logits, labels, comm=comm).loss


def sela_terms(logits: Float[Tensor, "B H*K"], labels: Int64[Tensor, "H B"], *, comm: Collective = LOCAL) -> SeLaTerms:
    """Return :func:`sela_loss` and the share of labels that are predicted."""
    check_rows(logits=logits)
    heads = len(labels) if labels.ndim == 2 else 0
    if labels.dtype != torch.int64 or not heads or labels.shape[1] != len(logits) or logits.shape[1] % heads:
        raise ValueError(
            f"labels must be int64 [H, B] with B = {len(logits)} rows, and H must divide the {logits.shape[1]} columns "
            f"of the logits, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(compute_dtype(logits.dtype)).unflatten(1, (heads, -1)).flatten(0, 1)
        classes = labels.T.reshape(-1)
        losses = F.cross_entropy(scores, classes.clamp(min=0), reduction="none").view(-1, heads)
        hits = (scores.detach().argmax(1) == classes).to(scores.dtype).view(-1, heads)
        means = labelled_mean(torch.stack([losses, hits], 2), (labels.T >= 0).unsqueeze(2).expand(-1, -1, 2), comm)
        loss, agreement = means.mean(0)
    check_result("the SeLa loss", loss, comm, logits=logits)
    return SeLaTerms(loss, agreement.detach())


class SeLaLoss(nn.Module):
    """Module of :func:`sela_loss`; the arguments are the same."""

    def __init__(self, *, comm: Collective = LOCAL) -> None:
        super().__init__()
        self.comm = comm

    def forward(self, logits: Float[Tensor, "B H*K"], labels: Int64[Tensor, "H B"]) -> Float[Tensor, ""]:
        return sela_loss(logits, labels, comm=self.comm)

    def extra_repr(self) -> str:
        return f"comm={self.comm}"
