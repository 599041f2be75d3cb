"""PIRL: an image and a transformed version of it, here its shuffled patches, agree with one row of a memory bank.

Misra & van der Maaten, "Self-Supervised Learning of Pretext-Invariant Representations" (CVPR 2020, arXiv:1912.01991),
section 3. The image and its patches are compared with the bank, never with each other. The default is InfoNCE, as in
the variant with MLP heads of VISSL's model zoo. "nce" is the estimator of the paper's own code in VISSL, "nce_paper"
equations 3 and 4 as they are printed.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from plugins.checks import check_choice, check_range, check_result, check_rows, check_whole, compute_dtype
from plugins.clock import Clock, Stepped
from plugins.distributed import LOCAL, Collective
from plugins.draws import distinct, step_generator
from plugins.linalg import attach_gradient, joined_mean, tangent, unit_rows

FORMS = ("info_nce", "nce", "nce_paper")
SAMPLINGS = ("offset", "vissl")
NCE_EPS = 2.0**-23
"""What VISSL adds to K / n: the machine epsilon of float32."""


class Bank(Protocol):
    """What the loss needs of :class:`plugins.targets.IndexedBank`."""

    @property
    def size(self) -> int: ...
    def logits(self, u: Tensor, index: Tensor) -> Tensor: ...
    def write(self, index: Tensor, z: Tensor, comm: Collective = LOCAL) -> None: ...


class PIRLLossTerms(NamedTuple):
    """Terms in nats, means over the joined batch. Only ``loss`` has a gradient."""

    loss: Float[Tensor, ""]
    """``patch_weight * patches + (1 - patch_weight) * image``."""
    patches: Float[Tensor, ""]
    image: Float[Tensor, ""]
    similarity: Float[Tensor, ""]
    """Mean cosine between the image's output and its row of the bank, in [-1, 1]."""
    log_normalizer: Float[Tensor, ""]
    """ln Z of the form "nce": the given value, or that of this batch; 0 for the other forms."""


def draw_negatives(
    index: Int64[Tensor, " B"], size: int, count: int, *, sampling: str = "offset", seed: int = 0, step: int = 0
) -> Int64[Tensor, "*two B K"]:
    """Draw the images with which each image of a batch is contrasted: ``idx_ik = (i + o_k) mod n``.

    The offsets o depend on ``seed`` and ``step`` only. So the negatives of an image do not depend on the number of
    processes, and a resumed run draws the same ones.

    Args:
        index: i, positions of the images in the training set.
        size: number n of images, ≥ 2.
        count: number K of negatives of each image, ≥ 1.
        sampling: "offset": distinct images without the image itself, the same for both terms of the loss; all n - 1
            others if K is larger. "vissl": each image's negatives are distributed as in VISSL, uniform with
            replacement, so that the image itself may be among them, and drawn for each term.
        seed: of the run.
        step: number of optimiser steps before this one.

    Returns:
        ``[B, K]``, or ``[2, B, K]`` (patch term, image term) with "vissl".

    Raises:
        ValueError: a number is out of range, or ``sampling`` is unknown.

    >>> draw_negatives(torch.tensor([0, 2]), 4, 3).sort(1)[0]
    tensor([[1, 2, 3],
            [0, 1, 3]])
    """
    check_choice("sampling", sampling, SAMPLINGS)
    check_whole("size", size, low=2)
    check_whole("count", count, low=1)
    generator = step_generator(seed, step)
    if sampling == "offset":
        offsets = distinct(size - 1, count, generator) + 1
    else:
        offsets = torch.randint(size, (2, 1, count), generator=generator)
    return (index.unsqueeze(1) + offsets.to(index.device)) % size


def pirl_terms(
    z_image: Float[Tensor, "B D"],
    z_patches: Float[Tensor, "B D"],
    index: Int64[Tensor, " B"],
    bank: Bank,
    *,
    negatives: Int64[Tensor, "*two B K"] | None = None,
    num_negatives: int = 4096,
    temperature: float = 0.1,
    patch_weight: float = 0.5,
    form: str = "info_nce",
    sampling: str = "offset",
    seed: int = 0,
    step: int = 0,
    log_normalizer: Float[Tensor, ""] | None = None,
    comm: Collective = LOCAL,
) -> PIRLLossTerms:
    """Compute ``λ mean_i ℓ(u(z_patches,i)) + (1 - λ) mean_i ℓ(u(z_image,i))``, u(z) = z / ‖z‖.

    With scores ``s_k = u · m_k / τ`` of the image's own row of the bank (k = 0) and of K negatives::

        info_nce    ℓ = ln Σ_(k ≥ 0) exp(s_k) - s_0
        nce         ℓ = sp(c - s_0) + Σ_(k ≥ 1) [sp(s_k - c) + ln(1 + ε n / K)],   c = ln Z + ln(K / n + ε)
        nce_paper   ℓ = sp(c - s_0) + Σ_(k ≥ 1) sp(s_k - c),                       c = ln Σ_(k ≥ 1) exp(s_k)

    where sp(x) = ln(1 + exp(x)). "nce" is ``-ln h_0 - Σ ln(1 - h_k)`` with ``h = p / (p + K / n)`` and
    ``p = exp(s) / Z``, with VISSL's ε. Z is n times the mean of exp(s) over the scores of the first batch's patch term,
    and constant from then on. The bank is read and not changed: ``bank.write(index, z_image, comm)`` comes afterwards.

    Args:
        z_image: outputs of the image head, one row per image of this process.
        z_patches: outputs of the patch head, in the same order.
        index: of the images in the training set, int64, in [0, n).
        bank: an allocated :class:`plugins.targets.IndexedBank` of width D.
        negatives: images of the bank, int64, for both terms or for each (patch term, image term); None draws them.
        num_negatives: K ≥ 1 of the draw; 32000 in the published ImageNet runs. See :func:`draw_negatives`.
        temperature: τ > 0; 0.1 with "info_nce", 0.07 with "nce" in the published runs.
        patch_weight: λ in [0, 1]. 0 is instance discrimination without a pretext task (NPID, arXiv:1805.01978).
        form: "info_nce", "nce" or "nce_paper".
        sampling: "offset" or "vissl", of the draw.
        seed: of the draw.
        step: of the draw, number of optimiser steps before this one.
        log_normalizer: ln Z for "nce"; None computes it from this batch. Keep the returned value.
        comm: the processes that share the batch. They exchange a few sums; backward communicates nothing.

    Returns:
        The loss of the joined batch and its terms, float32 (float64 for float64 input). A row with a norm below 1e-12
        has the scores 0 and no gradient.

    Raises:
        ValueError: a shape or dtype is wrong, a number is out of range, there are fewer than 2 images in the bank or no
            row in the joined batch, or (on the CPU) an output holds NaN or inf.
    """
    check_rows(z_image=z_image, z_patches=z_patches)
    _check_numbers(num_negatives, temperature, patch_weight, form, sampling)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != z_image.shape[:1]:
        given = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ValueError(
            f"index must be int64 [B] with B = {len(z_image)} rows, positions in the training set, got {given}"
        )
    if bank.size < 2:
        raise ValueError(
            f"PIRL needs a memory bank of at least 2 images, got {bank.size}; "
            "call its allocate with the number of training images"
        )
    if negatives is None:
        negatives = draw_negatives(index, bank.size, num_negatives, sampling=sampling, seed=seed, step=step)
    of_patches, of_image = negatives if negatives.ndim == 3 and len(negatives) == 2 else (negatives, negatives)
    if of_image.ndim != 2 or len(of_image) != len(z_image) or of_image.shape[1] < 1:
        raise ValueError(
            f"negatives must be [B, K] or [2, B, K] with B = {len(z_image)} rows, got shape {tuple(negatives.shape)}"
        )
    dtype = compute_dtype(torch.promote_types(z_image.dtype, z_patches.dtype))
    with torch.autocast(z_image.device.type, enabled=False):
        rows = []
        for z, others in ((z_patches, of_patches), (z_image, of_image)):
            places = torch.cat([index.unsqueeze(1), others], 1)
            losses, cosines, log_normalizer = _row_losses(
                z.to(dtype), places, bank, temperature, form, log_normalizer, comm
            )
            rows += [losses, cosines]
        patches, image, similarity = joined_mean(torch.stack([rows[0], rows[2], rows[3]], 1), comm)
        loss = patch_weight * patches + (1 - patch_weight) * image
    check_result("PIRL", loss, comm, z_image=z_image, z_patches=z_patches)
    return PIRLLossTerms(loss, patches.detach(), image.detach(), similarity.detach(), log_normalizer)


def pirl_loss(
    z_image: Float[Tensor, "B D"],
    z_patches: Float[Tensor, "B D"],
    index: Int64[Tensor, " B"],
    bank: Bank,
    *,
    negatives: Int64[Tensor, "*two B K"] | None = None,
    num_negatives: int = 4096,
    temperature: float = 0.1,
    patch_weight: float = 0.5,
    form: str = "info_nce",
    comm: Collective = LOCAL,
    **draw: Any,
) -> Float[Tensor, ""]:
    """Return the loss of :func:`pirl_terms`; the arguments are the same."""
    return pirl_terms(
        z_image,
        z_patches,
        index,
        bank,
        negatives=negatives,
        num_negatives=num_negatives,
        temperature=temperature,
        patch_weight=patch_weight,
        form=form,
        comm=comm,
        **draw,
    ).loss


def _row_losses(
    z: Tensor,
    index: Tensor,
    bank: Bank,
    temperature: float,
    form: str,
    log_normalizer: Tensor | None,
    comm: Collective,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ℓ of each row, its cosine with its own row of the bank, and ln Z.

    The gradient is computed here, because the bank changes before the backward pass of the network.
    """
    wanted = torch.is_grad_enabled() and z.requires_grad
    u, inverse = unit_rows(z)
    with torch.set_grad_enabled(wanted):
        scores = bank.logits(u.requires_grad_(wanted), index) / temperature
        if form != "nce":
            log_normalizer = u.new_zeros(())
        elif log_normalizer is None:
            # the scores are at most 1 / τ
            mean = joined_mean((scores.detach() - 1 / temperature).exp().mean(1), comm)
            log_normalizer = mean.log() + (1 / temperature + math.log(bank.size))
        losses = _losses(scores, form, log_normalizer, bank.size)
    cosines = scores[:, 0].detach() * temperature
    if wanted:
        (by_u,) = torch.autograd.grad(losses.sum(), u)
        losses = attach_gradient(losses.detach(), [z], [tangent(by_u, u.detach(), inverse)])
    return losses, cosines, log_normalizer


def _losses(scores: Float[Tensor, "B 1+K"], form: str, log_normalizer: Tensor, size: int) -> Float[Tensor, " B"]:
    if form == "info_nce":
        return scores.logsumexp(1) - scores[:, 0]
    own, others = scores[:, :1], scores[:, 1:]
    count = others.shape[1]
    if form == "nce":
        c, constant = log_normalizer + math.log(count / size + NCE_EPS), count * math.log1p(NCE_EPS * size / count)
    else:
        c, constant = others.logsumexp(1, keepdim=True), 0.0
    return _softplus(c - own).squeeze(1) + _softplus(others - c).sum(1) + constant


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=50)  # the default is off by 2e-9 from 20 on


def _check_numbers(num_negatives: int, temperature: float, patch_weight: float, form: str, sampling: str) -> None:
    check_whole("num_negatives", num_negatives, low=1)
    check_range("temperature", temperature, low=1e-6)
    check_range("patch_weight", patch_weight, low=0.0, high=1.0)
    check_choice("form", form, FORMS)
    check_choice("sampling", sampling, SAMPLINGS)


class PIRLLoss(Stepped, nn.Module):
    """Module of :func:`pirl_loss` with the memory: the bank, ln Z, and the number of steps.

    In training mode the outputs of the image head are written to the bank, after both terms have read it. In a step of
    several micro-batches they are written at its end, in :meth:`after_step`, so that all of them read the same bank.

    Args:
        bank: an :class:`plugins.targets.IndexedBank` of the embedding's width; allocate it before the first call.
        num_negatives, temperature, patch_weight, form, sampling, seed, comm: as in :func:`pirl_terms`.

    Buffers:
        log_normalizer: ln Z, ``[]``, set by the first batch in training mode with the form "nce"; NaN before. 0 with
            the other forms, which have none.

    Raises:
        ValueError: an argument is out of range.
    """

    log_normalizer: Tensor

    def __init__(
        self,
        bank: Bank,
        *,
        num_negatives: int = 4096,
        temperature: float = 0.1,
        patch_weight: float = 0.5,
        form: str = "info_nce",
        sampling: str = "offset",
        seed: int = 0,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__()
        _check_numbers(num_negatives, temperature, patch_weight, form, sampling)
        self.bank, self.form, self.seed, self.comm = bank, form, seed, comm
        self.num_negatives, self.temperature, self.sampling = num_negatives, temperature, sampling
        self.patch_weight = patch_weight
        self.clock = Clock()
        self.register_buffer("log_normalizer", torch.full((), torch.nan if form == "nce" else 0.0))
        self._normalized = False  # whether ln Z is known; looking at the buffer would wait for the device
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def forward(
        self,
        z_image: Float[Tensor, "B D"],
        z_patches: Float[Tensor, "B D"],
        index: Int64[Tensor, " B"],
        negatives: Int64[Tensor, "*two B K"] | None = None,
    ) -> Float[Tensor, ""]:
        return self.terms(z_image, z_patches, index, negatives).loss

    def terms(
        self,
        z_image: Float[Tensor, "B D"],
        z_patches: Float[Tensor, "B D"],
        index: Int64[Tensor, " B"],
        negatives: Int64[Tensor, "*two B K"] | None = None,
    ) -> PIRLLossTerms:
        """Return the loss and its parts; in training mode, update the memory."""
        step = self.clock.earlier()
        if self.form == "nce" and not self._normalized:
            self._normalized = not bool(self.log_normalizer.isnan())
        found = pirl_terms(
            z_image,
            z_patches,
            index,
            self.bank,
            negatives=negatives,
            num_negatives=self.num_negatives,
            temperature=self.temperature,
            patch_weight=self.patch_weight,
            form=self.form,
            sampling=self.sampling,
            seed=self.seed,
            step=step,
            log_normalizer=self.log_normalizer if self._normalized else None,
            comm=self.comm,
        )
        if self.training:
            if self.form == "nce" and not self._normalized:
                self.log_normalizer.copy_(found.log_normalizer)
                self._normalized = True
            self._outputs.append((index.detach(), z_image.detach()))
            if not self.stepping:
                self._write()
        return found

    def after_step(self) -> None:
        """End the open step: write the outputs of its micro-batches to the bank."""
        super().after_step()
        self._write()

    def discard_step(self) -> None:
        """Forget the open step and the outputs that it has not written."""
        self._outputs.clear()
        super().discard_step()

    def _write(self) -> None:
        if self._outputs:
            index, z = (torch.cat(parts) for parts in zip(*self._outputs, strict=True))
            self._outputs.clear()
            self.bank.write(index, z, self.comm)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._normalized = False
        self._outputs.clear()

    def extra_repr(self) -> str:
        return (
            f"num_negatives={self.num_negatives}, temperature={self.temperature}, patch_weight={self.patch_weight}, "
            f"form={self.form!r}, sampling={self.sampling!r}, seed={self.seed}, comm={self.comm}"
        )
