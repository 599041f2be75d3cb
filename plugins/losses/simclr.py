"""SimCLR: a softmax over all other views of the batch identifies the other views of the same image.

Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020,
arXiv:2002.05709), eq. 1 (NT-Xent). It equals :func:`plugins.losses.cissl_loss` with a single head and without the row's
own view among the columns. The published loss has two views. With V views the loss averages over the V - 1 positives of
a row, all of which are in the denominator.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_views
from plugins.distributed import LOCAL, Collective
from plugins.losses.cissl import CISSLTerms, contrastive_terms

Views = Sequence[Float[Tensor, "B D"]] | Float[Tensor, "V B D"]


def simclr_loss(views: Views, *, temperature: float = 0.5, comm: Collective = LOCAL) -> Float[Tensor, ""]:
    """Mean over rows (view v, image i) of ``-mean_(u != v) log softmax_j(cos(z_vi, z_j) / τ)`` at j = (u, i).

    The columns j are all V N rows of all processes, view u of image i, except (v, i) itself.

    Args:
        views: projections of V ≥ 2 views, as a list or one tensor.
        temperature: τ > 0; published: 0.1 on ImageNet, 0.5 on CIFAR-10 and in the paper's first experiments.
        comm: the processes that share the batch. Rows are gathered, and V N numbers more if gradients are needed.
            Backward communicates nothing.

    Returns:
        The loss of the joined batch, float32 (float64 for float64 input): log(V N - 1) if all rows are equal. The
        cosines of a row with a norm below 1e-8 are 0, and it gets no gradient.

    Raises:
        ValueError: a tensor in place of a list, the shapes differ, fewer than two views or images, or (on the CPU) a
            view holds NaN or inf.

    >>> import torch
    >>> same = torch.ones(2, 4, 3)
    >>> round(simclr_loss(same).item(), 5)  # log 7
    1.94591
    """
    return simclr_terms(views, temperature=temperature, comm=comm).loss


def simclr_terms(views: Views, *, temperature: float = 0.5, comm: Collective = LOCAL) -> CISSLTerms:
    """Return :func:`simclr_loss` and its bound on the mutual information."""
    named = check_views(views=views)
    if len(views) < 2:
        raise ValueError(f"the SimCLR loss needs at least 2 views, got {len(views)}")
    return contrastive_terms(
        views, views, named, "the SimCLR loss", temperature=temperature, positives="other", comm=comm
    )


class SimCLRLoss(nn.Module):
    """Module of :func:`simclr_loss`; the arguments are the same."""

    def __init__(self, *, temperature: float = 0.5, comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("temperature", temperature, low=1e-6)
        self.temperature, self.comm = temperature, comm

    def forward(self, views: Views) -> Float[Tensor, ""]:
        return simclr_loss(views, temperature=self.temperature, comm=self.comm)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, comm={self.comm}"
