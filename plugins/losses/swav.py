"""SwAV: predict the assignment of one view to prototypes from the other views of the image.

Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments" (NeurIPS 2020, arXiv:2006.09882), eqs. 1-5, with soft codes and three iterations as in its code. SEER
(Goyal et al. 2021, arXiv:2103.01988) is this loss with other settings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_result, check_rows, check_views, check_whole, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import joined_mean, sinkhorn_codes

Scores = Sequence[Float[Tensor, "B K"]]


class SwAVTerms(NamedTuple):
    """In nats. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    code_entropy: Float[Tensor, ""]
    """Mean entropy of the codes, in [0, log K]: log K if a code is the same for all prototypes."""


def swav_loss(
    scores: Scores,
    *,
    large: int = 2,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue_scores: Sequence[Float[Tensor, "Q K"]] | None = None,
    comm: Collective = LOCAL,
) -> Float[Tensor, ""]:
    """Mean over large views a and other views v of ``-Σ_k Q_a[i, k] log softmax_k(s_v[i] / τ)``, mean over rows i.

    ``Q_a`` are the codes of view a: its scores, assigned to prototypes of about equal mass by
    :func:`plugins.targets.sinkhorn_codes`. They have no gradient.

    Args:
        scores: cosines of V ≥ 2 views with K prototypes, large views first.
        large: number L ≥ 1 of views that have codes, which are the first ones.
        temperature: τ > 0.
        epsilon: ε > 0 of the codes.
        iterations: iterations of the codes, ≥ 1; 3 for SwAV, 10 for SEER.
        queue_scores: for each of the L views, scores of earlier rows with the present prototypes, which take part in
            the assignment of the batch. Each process passes other rows of the queue. None without a queue.
        comm: the processes that share the batch. They exchange K numbers per iteration and large view; backward
            communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input); log K if all scores are equal.

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, the numbers of views do not fit, a number is out of
            range, or (on the CPU) a view holds NaN or inf.

    Reference:
        arXiv:2006.09882, eqs. 1-5.

    >>> round(swav_loss([torch.zeros(4, 8)] * 2).item(), 5)  # log 8
    2.07944
    """
    options = {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}
    return swav_terms(scores, large=large, **options, queue_scores=queue_scores, comm=comm).loss


def swav_terms(
    scores: Scores,
    *,
    large: int = 2,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue_scores: Sequence[Float[Tensor, "Q K"]] | None = None,
    comm: Collective = LOCAL,
) -> SwAVTerms:
    """Return :func:`swav_loss` and the entropy of the codes."""
    named = check_views(scores=scores)
    check_whole("large", large, low=1)
    check_range("temperature", temperature, low=1e-6)
    if len(scores) < max(large, 2):
        raise ValueError(f"the SwAV loss needs at least 2 views, {large} of them large, got {len(scores)}")
    rows, dtype = len(scores[0]), compute_dtype(scores[0].dtype)
    assigned = torch.stack([*scores[:large]]).detach().to(dtype)
    if queue_scores is not None:
        assigned = torch.cat([_queued(queue_scores, assigned).to(dtype), assigned], 1)
    with torch.autocast(assigned.device.type, enabled=False):
        codes = sinkhorn_codes(assigned, epsilon=epsilon, iterations=iterations, comm=comm)
        codes = codes[:, codes.shape[1] - rows :]
        total, share = codes.sum(0), 1 / (large * (len(scores) - 1))
        losses = []
        for v, view in enumerate(scores):  # one cross-entropy per view, with the sum of the other views' codes
            targets = total - codes[v] if v < large else total
            losses.append(-share * (targets * (view.to(dtype) / temperature).log_softmax(1)).sum(1))
        entropies = torch.special.entr(codes).sum(2).mean(0)
        loss, entropy = joined_mean(torch.stack([torch.stack(losses).sum(0), entropies], 1), comm).unbind()
    check_result("the SwAV loss", loss, comm, **named)
    return SwAVTerms(loss, entropy.detach())


def _queued(queue_scores: Sequence[Tensor], scores: Float[Tensor, "L B K"]) -> Float[Tensor, "L Q K"]:
    """Check the scores of the queue and stack them."""
    check_rows(**{f"queue_scores[{v}]": view for v, view in enumerate(queue_scores)})
    if len(queue_scores) != len(scores) or queue_scores[0].shape[1] != scores.shape[2]:
        raise ValueError(
            f"queue_scores must be {len(scores)} matrices with {scores.shape[2]} columns, one for each large view, "
            f"got shapes {[tuple(view.shape) for view in queue_scores]}"
        )
    return torch.stack([*queue_scores]).detach()


class SwAVLoss(nn.Module):
    """Module of :func:`swav_loss`; the arguments are the same."""

    def __init__(
        self,
        *,
        large: int = 2,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        check_whole("large", large, low=1)
        check_range("temperature", temperature, low=1e-6)
        check_range("epsilon", epsilon, low=1e-6)
        check_whole("iterations", iterations, low=1)
        self.options = {"large": large, "temperature": temperature, "epsilon": epsilon, "iterations": iterations}
        self.comm = comm

    def forward(self, scores: Scores, queue_scores: Sequence[Float[Tensor, "Q K"]] | None = None) -> Float[Tensor, ""]:
        return swav_loss(scores, **self.options, queue_scores=queue_scores, comm=self.comm)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in {**self.options, "comm": self.comm}.items())
