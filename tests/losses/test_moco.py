"""MoCo: known values, slow reference, limits, gradient, processes, degenerate batches, the queue of the method."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plugins.distributed import LOCAL
from plugins.losses import MoCoLoss, moco_loss, moco_terms
from plugins.methods import METHODS
from plugins.objective import Objective
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views


def _reference_moco(query, key, queue, tau=0.2):
    total = 0.0
    for q, k in zip(query.numpy(), key.numpy(), strict=True):
        q, k = q / math.sqrt(q @ q), k / math.sqrt(k @ k)
        scores = np.array([q @ k, *(q @ n for n in queue.numpy())]) / tau
        total += math.log(sum(math.exp(s - scores.max()) for s in scores)) + scores.max() - scores[0]
    return total / len(query)


def _queue(size, width, seed=3, dtype=torch.float64):
    return F.normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def test_known_values():
    eye = torch.eye(3, dtype=torch.float64)
    terms = moco_terms(eye, 5 * eye, -eye[:1], temperature=0.5)  # cosines of the negative: -1, 0, 0
    assert terms.loss.item() == pytest.approx((math.log(1 + math.exp(-4)) + 2 * math.log(1 + math.exp(-2))) / 3)
    assert terms.similarity.item() == pytest.approx(1) and terms.accuracy.item() == 1
    assert moco_terms(eye, -eye, eye).accuracy.item() == 0
    same = torch.ones(4, 2, dtype=torch.float64)
    assert moco_loss(same, same, F.normalize(torch.ones(7, 2, dtype=torch.float64))).item() == pytest.approx(
        math.log(8)
    )


@pytest.mark.parametrize("shape", [(1, 3, 1), (6, 5, 9), (5, 4, 2)])
@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_equals_the_slow_reference(shape, tau):
    (query, key), queue = toy_views(*shape[:2]), _queue(shape[2], shape[1])
    expected = _reference_moco(query, key, queue, tau)
    module = MoCoLoss(temperature=tau)
    assert module(query, key, queue).item() == pytest.approx(expected, rel=1e-10)
    assert module(query.float(), key.float(), queue.float()).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert f"temperature={tau}" in repr(module)


def test_random_rows():
    """log(K + 1) + 1 / (2 d τ²) for independent unit rows."""
    query, key = (_queue(512, 128, seed) for seed in (0, 1))
    value = moco_loss(query, key, _queue(4096, 128, 2), temperature=0.2).item()
    assert value == pytest.approx(math.log(4097) + 1 / (2 * 128 * 0.2**2), abs=0.03)


def test_gradient_is_the_querys_alone_and_orthogonal_to_it():
    (query, key), queue = toy_views(5, 4), _queue(6, 4)
    leaves = [tensor.requires_grad_() for tensor in (query, key, queue)]
    of_query, of_key, of_queue = torch.autograd.grad(moco_loss(*leaves), leaves, allow_unused=True)
    assert of_key is None and of_queue is None
    torch.testing.assert_close((of_query * query).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda q: moco_loss(q, key, queue), query)


def test_the_queue_may_be_written_before_backward():
    (query, key), queue = toy_views(5, 4), _queue(6, 4)
    query.requires_grad_()
    (expected,) = torch.autograd.grad(moco_loss(query, key, queue), query)
    loss = moco_loss(query, key, queue)
    queue[:5] = key
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], expected, rtol=0, atol=0)


def test_ignores_scales_and_orders():
    (query, key), queue = toy_views(5, 4), _queue(6, 4)
    value = moco_loss(query, key, queue).item()
    assert moco_loss(3 * query, key / 7, queue.flip(0)).item() == pytest.approx(value, rel=1e-12)
    assert moco_loss(query.flip(0), key.flip(0), queue).item() == pytest.approx(value, rel=1e-12)
    assert moco_loss(query.flip(0), key, queue).item() != pytest.approx(value, rel=1e-3)


def test_wrong_input_is_refused():
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"queue must have shape \[K, 3\] with K >= 1, got \(2, 4\)"):
        moco_loss(z, z, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"queue must have shape \[K, 3\] with K >= 1, got \(0, 3\)"):
        moco_loss(z, z, z[:0])
    with pytest.raises(ValueError, match="key must have the shape of query"):
        moco_loss(z, z[:2], z)
    with pytest.raises(ValueError, match="at least 1 rows over all processes, got 0"):
        moco_loss(z[:0], z[:0], z)
    for make in (MoCoLoss, lambda **options: moco_loss(z, z, z, **options)):
        with pytest.raises(ValueError, match="temperature"):
            make(temperature=0.0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_batches_are_finite(kind, device):
    for rows, width in ((1, 5), (2, 40), (40, 6)):
        queue = _queue(8, width, dtype=torch.float32).to(device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            query, key = (view.to(device, dtype).requires_grad_() for view in difficult_views(kind, rows, width))
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = moco_loss(query, key, queue)
            (gradient,) = torch.autograd.grad(loss, query)
            assert loss.dtype == torch.float32 and loss.isfinite() and gradient.isfinite().all()
            if kind == "zero":
                assert loss.item() == pytest.approx(math.log(9), rel=1e-6) and not gradient.any()
            else:
                expected = _reference_moco(query.detach().double().cpu(), key.detach().double().cpu(), queue.cpu())
                assert loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-5)


def _step(comm, model, x0, x1):
    return moco_loss(model(x0), model(x1), _queue(6, 4), comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(8, 3), (2, 9, 1), (6, 0)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    assert_joined(ranks, _step, toy_views(sum(counts), 5), counts)


def _sums(comm, *x):
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        moco_loss(*x, _queue(6, 4), comm=comm)
    return [call.args[0].numel() for call in reduced.call_args_list]


@pytest.mark.ddp
def test_one_sum_over_the_processes(ranks):
    """Of the loss, the similarity, the accuracy and the number of rows."""
    assert ranks.run(_sums, [(*toy_views(2, 4, seed=seed),) for seed in range(3)]) == [[4]] * 3


def _method(comm=LOCAL, **given):
    spec = METHODS["moco"]
    options = spec.resolve({"proj_output_dim": 4, "queue_size": 10, **given})
    return Objective(spec, options, comm).double()


def _embeddings(rows=4, views=2, seed=0):
    every = toy_views(rows, 4, views=views + 2, seed=seed)
    return Embeddings(every[:views], every[:views], every[views:])


def test_keys_are_written_after_the_logits_and_wrap():
    objective, queue, keys = _method(), _queue(10, 4), []
    objective.criterion.queue.rows.copy_(queue)
    for step in range(4):
        e = _embeddings(seed=step)
        assert objective(e).loss.item() == pytest.approx(_reference_moco(e.p[0], e.target[1], queue, 0.2), rel=1e-9)
        keys.extend(F.normalize(e.target[1], dim=1))
        for number in range(4 * step, 4 * step + 4):
            queue[number % 10] = keys[number]
        torch.testing.assert_close(objective.criterion.queue.rows, queue)
        if step == 0:
            torch.testing.assert_close(objective.criterion.queue.rows[:4], torch.stack(keys))
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()(e)
    torch.testing.assert_close(dict(objective.state_dict()), state, rtol=0, atol=0)
    other = _method()
    other.load_state_dict(state)
    assert torch.equal(other(e).loss, objective(e).loss)


@pytest.mark.parametrize("views", [3, 5])
def test_every_view_but_the_key_is_a_query(views):
    e, objective = _embeddings(views=views), _method()
    queue = objective.criterion.queue.rows.clone()
    values = [_reference_moco(e.p[v], e.target[1], queue, 0.2) for v in range(views) if v != 1]
    assert objective(e).loss.item() == pytest.approx(np.mean(values), rel=1e-9)


@pytest.mark.parametrize("views", [2, 4])
def test_the_symmetric_loss_is_the_mean_of_both_orders(views):
    """Each of the two large views is the key of all others; the keys of the first view are written first."""
    e, objective = _embeddings(views=views), _method(symmetric=True)
    queue = objective.criterion.queue.rows.clone()
    orders = [
        np.mean([_reference_moco(e.p[v], e.target[key], queue) for v in range(views) if v != key]) for key in (0, 1)
    ]
    terms = objective(e)
    assert terms.loss.item() == pytest.approx(np.mean(orders), rel=1e-9)
    expected = torch.cat([F.normalize(e.target[0], dim=1), F.normalize(e.target[1], dim=1), queue[8:]])
    torch.testing.assert_close(objective.criterion.queue.rows, expected)
    swapped = Embeddings(e.z, [e.p[1], e.p[0], *e.p[2:]], e.target[::-1])
    assert _method(symmetric=True)(swapped).loss.item() == pytest.approx(terms.loss.item(), rel=1e-12)


def test_heads_are_those_of_the_papers():
    spec = METHODS["moco"]
    for name, kinds in (("linear", "Linear"), ("mlp", "Linear ReLU Linear")):
        head = spec.head(6, spec.resolve({"head": name, "proj_hidden_dim": 5, "proj_output_dim": 4}))
        assert " ".join(type(layer).__name__ for layer in head) == kinds and head(torch.zeros(2, 6)).shape == (2, 4)


def _steps(comm, symmetric, *batches):
    objective = _method(comm, symmetric=symmetric)
    for views in batches:
        z = [view.requires_grad_() for view in views[:2].clone()]
        loss = objective(Embeddings(z, z, [*views[2:]])).loss
    return loss.detach(), torch.autograd.grad(loss, z[0])[0] / comm.size, dict(objective.state_dict())


@pytest.mark.ddp
@pytest.mark.parametrize(("counts", "symmetric"), [((4, 3), False), ((1, 4, 2), False), ((1, 4, 2), True)])
def test_ranks_share_the_queue(ranks, counts, symmetric):
    batches = [torch.stack(toy_views(7, 4, views=4, seed=seed)) for seed in range(3)]
    loss, gradient, state = _steps(LOCAL, symmetric, *batches)
    parts = zip(*(batch.split(counts, 1) for batch in batches), strict=True)
    found = ranks.run(_steps, [(symmetric, *part) for part in parts])
    torch.testing.assert_close(torch.cat([of_rank for _, of_rank, _ in found]), gradient, rtol=1e-10, atol=1e-12)
    for their_loss, _, theirs in found:
        torch.testing.assert_close((their_loss, theirs), (loss, state), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiles_to_one_graph():
    (query, key), queue = [view.float() for view in toy_views(6, 5)], _queue(7, 5, dtype=torch.float32)
    query.requires_grad_()
    compiled = torch.compile(moco_loss, fullgraph=True, backend="aot_eager")
    expected, found = moco_loss(query, key, queue), compiled(query, key, queue)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, query), torch.autograd.grad(expected, query))
