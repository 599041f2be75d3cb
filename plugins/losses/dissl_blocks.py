"""Compute DISSL's loss and its gradient in one pass over blocks of rows. Used by :mod:`plugins.losses.dissl`.

With P, Q and A the sums of p_t, log q_s and log p_u, the sum over pairs t ≠ s of -p_t · log q_s is -P · Q plus the sum
of p_t · log q_t, and likewise for log p_u: one product instead of one for each pair. A block of rows stays in the
processor's cache during the whole computation. The gradient overwrites the memory of p, so that the gradients are the
only new tensors of the size of the logits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_count, compute_dtype
from plugins.distributed import Collective
from plugins.linalg import attach_gradient

Views = Sequence[Float[Tensor, "B C"]] | Float[Tensor, "V B C"]
BLOCK = {"cpu": 2**17}
"""Number of entries of a view in one block, by device type: on the CPU they fit the cache. Other devices: 2^24."""


def value_and_parts(
    teacher: Views,
    student: Views,
    chosen: list[int],
    weights: tuple[float | Tensor, ...],
    taus: tuple[float, float],
    comm: Collective,
) -> dict[str, Tensor]:
    """Return the loss, with its gradient, and its parts. The arguments have been checked by ``dissl_terms``.

    Args:
        teacher: logits of T views.
        student: logits of S views.
        chosen: indices of the teacher views that are assignments.
        weights: weights of distillation, maximality and invariance.
        taus: temperatures of teacher and student.
        comm: the processes that share the batch.

    Returns:
        The fields of :class:`plugins.losses.dissl.DISSLTerms`.
    """
    (rows, classes), firsts, (w, lam, beta) = teacher[0].shape, len(chosen), weights
    p_pairs, q_pairs = firsts * (len(teacher) - 1), firsts * (len(student) - 1)
    inputs = _tensors(teacher) + _tensors(student)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    by_teacher, by_student = _room(teacher), _room(student) if wanted else []
    blocks = _blocks(rows, classes, teacher[0].device.type)

    for p, view in zip(by_teacher, teacher, strict=True):  # p is in the memory of its gradient
        for block in blocks:
            p[block] = F.softmax(view.detach()[block].to(p.dtype) / taus[0], 1)
    mass = comm.sum(torch.cat([*(by_teacher[t].sum(0) for t in chosen), by_teacher[0].new_full((1,), rows)]))
    if rows == 0:  # the joined batch can be empty only in this case, so only this case synchronises
        check_count(int(mass[-1].item()), least=1, what="the DISSL loss")
    # probabilities are summed without logarithms: those that underflow contribute less than 1e-36 of the entropy
    marginals = (mass[:-1] / mass[-1]).view(firsts, classes)
    log_marginals = marginals.clamp_min(torch.finfo(mass.dtype).tiny).log()
    maximality = -_dot(marginals, log_marginals) / firsts

    slopes = w / q_pairs, beta / max(p_pairs, 1), log_marginals * (lam / firsts)
    sums = mass.new_zeros(5)
    for block in blocks:
        p, t, s, q = ([view.detach()[block] for view in views] for views in (by_teacher, teacher, student, by_student))
        sums += _block(p, t, s, q, chosen, taus, slopes)
    distillation, invariance, agreement, own, every = (comm.sum(sums) / mass[-1]).unbind()
    distillation, invariance = distillation / q_pairs, invariance / max(p_pairs, 1)
    loss = (w * distillation - lam * maximality + beta * invariance).to(mass.dtype)
    if wanted:
        zero = attach_gradient(torch.zeros_like(loss), inputs, _tensors(by_teacher) + _tensors(by_student))
        loss = loss + zero * (comm.size / mass[-1])
    return {
        "loss": loss,
        "distillation": distillation,
        "invariance": invariance,
        "H_M": maximality,
        "H_Mlz": every / len(teacher),
        "KL_invariance": invariance - own / firsts if p_pairs else torch.zeros_like(own),
        "KL_distillation": (agreement - own) / firsts,
    }


def _block(
    p: list[Tensor],
    teacher: list[Tensor],
    student: list[Tensor],
    q: list[Tensor],
    chosen: list[int],
    taus: tuple[float, float],
    slopes: tuple[float | Tensor, float | Tensor, Tensor],
) -> Tensor:
    """Return sums over a block of rows: D and I (times their pairs), and the cross-entropies and entropies to log.

    If q is not empty, the gradients, times the number of joined rows, are written to p and q. The gradient of D by the
    student's logits of view s is ``n q_s - sum of p_t`` over the n assignments t ≠ s. That by the teacher's logits of
    view t is the backward pass of a softmax, applied to ``-sum of log q_s`` over s ≠ t.
    """
    by_d, by_i, by_h = slopes
    firsts, dtype = len(chosen), p[0].dtype
    log_p = [F.log_softmax(view.to(dtype) / taus[0], 1) for view in teacher]
    all_p, all_log_p = sum((p[t] for t in chosen[1:]), p[chosen[0]]), sum(log_p[1:], log_p[0])
    all_log_q, same = torch.zeros_like(all_p), {}
    for s, view in enumerate(student):
        view = view.to(dtype)
        log_q = F.log_softmax(view if taus[1] == 1 else view / taus[1], 1)
        all_log_q += log_q
        if s in chosen:
            same[s] = log_q
        if q:
            count, others = (firsts - 1, all_p - p[s]) if s in chosen else (firsts, all_p)
            q[s].copy_((log_q.exp() * count).sub_(others).mul_(by_d / taus[1]))
    agreement = -torch.stack([_dot(p[t], same[t]) for t in chosen]).sum()
    entropies = torch.stack([-_dot(a, b) for a, b in zip(p, log_p, strict=True)])
    own = torch.stack([entropies[t] for t in chosen]).sum()
    d, i = -_dot(all_p, all_log_q) - agreement, -_dot(all_p, all_log_p) - own
    if q:
        shared = all_p * by_i
        for t, view in enumerate(p):
            if t not in chosen:
                view.mul_(by_i * firsts).sub_(shared).div_(taus[0])
                continue
            slope = (same[t] - all_log_q).mul_(by_d).add_((log_p[t] - all_log_p).mul_(by_i)).add_(by_h[chosen.index(t)])
            slope -= (view * slope).sum(1, keepdim=True) - by_i * firsts
            view.mul_(slope).sub_(shared).div_(taus[0])
    return torch.stack([d, i, agreement, own, entropies.sum()])


def _blocks(rows: int, classes: int, device: str) -> list[slice]:
    size = rows if torch.compiler.is_compiling() else BLOCK.get(device, 2**24) // classes
    return [slice(start, start + max(size, 1)) for start in range(0, rows, max(size, 1))]


def _room(views: Views) -> Views:
    """Allocate uninitialised tensors of the views' shapes, in the dtype of the computation."""
    dtype = compute_dtype(views[0].dtype)
    if isinstance(views, Tensor):
        return torch.empty_like(views, dtype=dtype)
    return [torch.empty_like(view, dtype=dtype) for view in views]


def _tensors(views: Views) -> list[Tensor]:
    return [views] if isinstance(views, Tensor) else list(views)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum the products. A matrix product would be rounded by tensor cores."""
    return (a * b).sum()
