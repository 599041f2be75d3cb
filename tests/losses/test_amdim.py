"""AMDIM: known values, slow reference, properties, gradients, several processes, dtypes, memory."""

import math

import numpy as np
import pytest
import torch

from plugins import linalg
from plugins.distributed import LOCAL
from plugins.losses import AMDIMLoss, AMDIMView, amdim_loss, amdim_nce
from plugins.methods import METHODS
from plugins.methods.amdim import draw_locations
from plugins.objective import Objective, connect, embed, encode_views
from plugins.spec import Embeddings
from plugins.testing import assert_joined, devices, toy_backbone, toy_views


def _inputs(rows=6, width=5, locations=3, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    source = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    targets = scale * torch.randn(rows, width, locations, generator=generator, dtype=torch.float64)
    return source, targets


def _reference(source, targets, clip=20.0, reg=0.05):
    """One image and one location at a time, as a log-softmax over the positive and the negatives."""
    a, t = source.detach().numpy(), targets.detach().numpy()
    rows, width, locations = t.shape
    score = np.array(
        [[[a[i] @ t[j, :, m] / math.sqrt(width) for m in range(locations)] for j in range(rows)] for i in range(rows)]
    )
    squashed = clip * np.tanh(score / clip)
    losses = []
    for i in range(rows):
        negatives = [squashed[i, j, m] for j in range(rows) if j != i for m in range(locations)]
        for m in range(locations):
            every = np.array([squashed[i, i, m], *negatives])
            losses.append(every.max() + np.log(np.exp(every - every.max()).sum()) - every[0])
    return np.mean(losses) + reg * np.mean(score**2)


def _plain(source, targets, clip=20.0, reg=0.05):
    """The formula with all scores at the same time, left to autograd."""
    rows, width, _ = targets.shape
    scores = torch.einsum("id,jdl->ijl", source, targets) / math.sqrt(width)
    squashed = clip * torch.tanh(scores / clip)
    own = torch.eye(rows, dtype=torch.bool, device=source.device)
    mass = squashed.masked_fill(own[:, :, None], -math.inf).flatten(1).logsumexp(1, keepdim=True)
    positive = squashed.diagonal().T
    return torch.logaddexp(mass - positive, positive.new_zeros(())).mean() + reg * scores.square().mean()


def _views(rows=6, width=5, coarse=4, fine=9, views=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (rows, width, coarse), (rows, width, fine)
    made = [
        AMDIMView(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))
        for _ in range(views)
    ]
    return made, [torch.randint(coarse, (rows,), generator=generator) for _ in range(views)]


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "locations", "value"), [(7, 25, 5.0172798), (7, 49, 5.6869754), (32, 25, 6.65415)])
def test_zero_maps(rows, locations, value):
    terms = amdim_nce(torch.zeros(rows, 8).double(), torch.zeros(rows, 8, locations).double())
    assert terms.loss.item() == pytest.approx(value, abs=1e-5)
    assert terms.loss.item() == pytest.approx(math.log1p(locations * (rows - 1)), rel=1e-12)
    assert terms.reg == 0


@pytest.mark.parametrize(("locations", "value"), [(25, 9.2603), (49, 9.9332)])
def test_random_maps_of_unit_variance(locations, value):
    """log(1 + L (N − 1)) + ½, and the weight of the regulariser."""
    generator = torch.Generator().manual_seed(0)
    terms = amdim_nce(
        torch.randn(256, 1024, generator=generator), torch.randn(256, 1024, locations, generator=generator)
    )
    assert (terms.loss - terms.reg).item() == pytest.approx(value, abs=0.04)
    assert terms.reg.item() == pytest.approx(0.05, rel=0.02)


def test_perfect_orthogonal_features_in_float32():
    source = 1e3 * torch.eye(32)
    loss = amdim_nce(source, source[:, :, None].expand(32, 32, 25), reg=0.0).loss
    assert loss.item() == pytest.approx(math.log1p(775 * math.exp(-20)), rel=1e-3)


def test_one_image_has_no_negatives():
    source, targets = (x.requires_grad_() for x in _inputs(rows=1))
    terms = amdim_nce(source, targets, reg=0.0)
    assert terms.loss == 0
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(terms.loss, (source, targets)))


@pytest.mark.parametrize("options", [{}, {"clip": 2.0, "reg": 0.0}, {"clip": 200.0, "reg": 1.0}], ids=str)
def test_equals_slow_reference(options):
    source, targets = _inputs()
    expected = _reference(source, targets, **options)
    assert amdim_nce(source, targets, **options).loss.item() == pytest.approx(expected, rel=1e-12)
    single = amdim_nce(source.float(), targets.float(), **options).loss
    assert single.item() == pytest.approx(expected, rel=1e-5) and single.dtype == torch.float32
    assert _plain(source, targets, **options).item() == pytest.approx(expected, rel=1e-12)


def _mean_of_pairs(views, locations, large):
    total = 0.0
    for v, view in enumerate(views):
        rows = torch.arange(len(view.whole))
        local = view.coarse[rows, :, locations[v]]
        for u, other in enumerate(views[:large]):
            if u != v:
                total += _plain(view.whole, other.coarse) + _plain(view.whole, other.fine)
                total += _plain(local, other.coarse)
    return total / (large * (len(views) - 1))


@pytest.mark.parametrize(("count", "large"), [(2, 2), (3, 3), (4, 2)])
def test_the_loss_is_the_mean_over_pairs_of_three_terms(count, large):
    views, locations = _views(views=count)
    for small in range(large, count):
        views[small] = AMDIMView(views[small].whole, views[small].coarse[:, :, :1], views[small].fine[:, :, :4])
        locations[small] = torch.zeros_like(locations[small])
    leaves = [part.requires_grad_() for view in views for part in view]
    loss, expected = amdim_loss(views, locations, large=large), _mean_of_pairs(views, locations, large)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, known = (
        torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) for value in (loss, expected)
    )
    for one, other in zip(found, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_terms_and_module():
    views, locations = _views()
    views[0].whole.requires_grad_()
    module = AMDIMLoss(clip=5.0, reg=0.1)
    terms = module.terms(views, locations)
    for loss in (module(views, locations), amdim_loss(views, locations, clip=5.0, reg=0.1)):
        assert torch.equal(terms.loss, loss)
    assert [term.requires_grad for term in terms] == [True, False]
    without = amdim_loss(views, locations, clip=5.0, reg=0.0)
    assert terms.loss.item() == pytest.approx(without.item() + terms.reg.item(), rel=1e-12)
    assert repr(module) == "AMDIMLoss(clip=5.0, reg=0.1, comm=Collective(size=1))"


# --- properties -----------------------------------------------------------------------------------------------------


def test_invariances_and_bounds():
    source, targets = _inputs(7, 5, 4)
    terms = amdim_nce(source, targets)
    order, places = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (7, 4))
    rotation, _ = torch.linalg.qr(toy_views(5, 5, views=1)[0])
    for other in (
        amdim_nce(source[order], targets[order]),
        amdim_nce(source, targets[:, :, places]),
        amdim_nce(source @ rotation, torch.einsum("idl,de->iel", targets, rotation)),
    ):
        assert other.loss.item() == pytest.approx(terms.loss.item(), rel=1e-13)
    assert amdim_nce(source, targets[order]).loss.item() != pytest.approx(terms.loss.item(), rel=1e-3)
    extreme = amdim_nce(1e3 * source, 1e3 * targets, reg=0.0).loss
    assert 0 <= extreme <= 2 * 20 + math.log1p(4 * 6)


def test_other_locations_of_the_own_image_are_no_negatives():
    """Image 0 alone has a loss in which the map of image 0 at one location does not reach the other location's term."""
    source, targets = _inputs(2, 5, 2)
    targets.requires_grad_()
    own = source[:1] @ targets[0] / math.sqrt(5)
    (gradient,) = torch.autograd.grad(amdim_nce(source, targets, reg=0.0).loss, targets)
    squashed = 20 * torch.tanh(own / 20)
    rest = 20 * torch.tanh(source[:1] @ targets[1] / math.sqrt(5) / 20)
    missed = torch.sigmoid(rest.logsumexp(1) - squashed)  # of image 0 only: each location by itself
    as_positive = -missed * (1 - (squashed / 20) ** 2) / 4
    rows = source[1:] @ targets[0] / math.sqrt(5)
    other = 20 * torch.tanh(rows / 20)
    of_one = 20 * torch.tanh(source[1:] @ targets[1] / math.sqrt(5) / 20)
    share = torch.softmax(other, 1) * torch.sigmoid(other.logsumexp(1) - of_one).sum()
    as_negative = share * (1 - (other / 20) ** 2) / 4
    expected = (source[0][:, None] * as_positive + source[1][:, None] * as_negative) / math.sqrt(5)
    torch.testing.assert_close(gradient[0], expected.detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("device", devices())
def test_degenerate_batches_are_finite(device):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-4, 1.0, 1e4):
        for rows in (1, 2, 9):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                source = (scale * torch.randn(1, 6, generator=generator)).expand(rows, 6)
                targets = (scale * torch.randn(1, 6, 4, generator=generator)).expand(rows, 6, 4)
                free = [x.to(device, dtype).float().requires_grad_() for x in (source, targets)]
                terms = amdim_nce(*free)
                assert terms.loss.isfinite(), (scale, rows, dtype)
                assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(terms.loss, free))
                halves = amdim_nce(*(x.detach().to(dtype) for x in free)).loss
                assert halves.dtype == torch.float32 and halves.item() == pytest.approx(terms.loss.item(), rel=1e-4)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip": 2.0, "reg": 0.7}], ids=str)
@pytest.mark.parametrize("scores", [linalg.CPU_SCORES, 1])
def test_gradient_is_that_of_autograd(options, scores, monkeypatch):
    """The loss is computed in one block of rows, and in blocks of 16 rows."""
    monkeypatch.setattr(linalg, "CPU_SCORES", scores)
    leaves = [x.requires_grad_() for x in _inputs(37, 5, 3)]
    found = torch.autograd.grad(3 * amdim_nce(*leaves, **options).loss, leaves)
    expected = torch.autograd.grad(3 * _plain(*leaves, **options), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_gradcheck_and_no_gradient_where_none_is_wanted():
    leaves = [x.requires_grad_() for x in _inputs(3, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: amdim_nce(*x).loss, leaves)
    with torch.no_grad():
        assert not amdim_nce(*leaves).loss.requires_grad
    assert not amdim_nce(*(x.detach() for x in leaves)).loss.requires_grad
    assert amdim_nce(leaves[0].detach(), leaves[1]).loss.requires_grad, "of the maps alone"


def test_autocast_and_compile():
    source, targets = (x.float() for x in _inputs())
    plain = amdim_nce(source, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(amdim_nce(source, targets).loss, plain)
    compiled = torch.compile(lambda a, t: amdim_nce(a, t).loss, fullgraph=True, backend="eager")
    assert compiled(source, targets).item() == pytest.approx(plain.item(), rel=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_input():
    source, targets = _inputs()
    shapes = r"needs sources \[N, D\] and targets \[N, D, L\] with L > 0, got "
    for bad in (targets[:5], targets[:, :4], targets[:, :, :0], targets[:, :, 0]):
        with pytest.raises(ValueError, match=shapes):
            amdim_nce(source, bad)
    with pytest.raises(ValueError, match="clip must be"):
        amdim_nce(source, targets, clip=0)
    with pytest.raises(ValueError, match="reg must be"):
        AMDIMLoss(reg=-1.0)
    views, locations = _views()
    with pytest.raises(ValueError, match=r"at least 2 views and a vector of locations for each, got 1 views and 1 "):
        amdim_loss(views[:1], locations[:1])
    with pytest.raises(ValueError, match=r"locations must be in 0…3, got -1 to 3"):
        amdim_loss(views, [locations[0], torch.tensor([0, 1, 2, 3, -1, 0])])
    with pytest.raises(ValueError, match="the AMDIM loss needs at least 1 rows over all processes, got 0"):
        amdim_nce(source[:0], targets[:0])
    for name, bad in (("source 0", (source * torch.nan, targets)), ("targets", (source, targets / 0))):
        with pytest.raises(ValueError, match=name):
            amdim_nce(*bad)


# --- the method -----------------------------------------------------------------------------------------------------


def test_the_method_pools_projects_and_compares_the_maps_of_both_views():
    """By hand: hooks, average pooling, projections, and the sum of six terms with the locations of the first step."""
    torch.manual_seed(0)
    spec, backbone = METHODS["amdim"], toy_backbone().double()
    options = spec.resolve({"proj_output_dim": 5, "locations_seed": 3})
    head = spec.head(8, options)
    connect(head, backbone, spec.taps(options))
    head.double().eval()
    views = [torch.randn(6, 3, 17, 17, dtype=torch.float64) for _ in range(2)]
    features, maps = encode_views(backbone.eval(), views, spec.taps(options))
    found = Objective(spec, options, LOCAL, None, head)(embed(features, head, maps=maps)).loss

    def of_cells(map_, side):
        cells = map_.unflatten(3, (side, 8 // side)).unflatten(2, (side, 8 // side)).mean((3, 5))
        return cells.flatten(2)

    made = []
    for view in views:
        inner = backbone[:3](view)  # 8 x 8 pixels
        fine, coarse = of_cells(inner, 4), of_cells(inner, 2)
        made.append(
            AMDIMView(
                head.whole(inner.mean((2, 3))),
                torch.stack([head.coarse(coarse[:, :, place]) for place in range(4)], 2),
                torch.stack([head.fine(fine[:, :, place]) for place in range(16)], 2),
            )
        )
    locations = draw_locations([4, 4], 6, seed=3, step=0)
    assert found.item() == pytest.approx(_mean_of_pairs(made, locations, 2).item(), rel=1e-10)
    parts = head.named_parameters()
    gradients = torch.autograd.grad(found, [*backbone.parameters(), *(p for _, p in parts)], allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def test_locations_are_uniform_and_depend_on_seed_and_step():
    counts = torch.cat(draw_locations([25], 20000, seed=0, step=0)).bincount(minlength=25)
    assert counts.sub(800).abs().max() < 5 * 28
    first = draw_locations([25, 25], 40, seed=0, step=7)
    assert all(torch.equal(*pair) for pair in zip(first, draw_locations([25, 25], 40, seed=0, step=7), strict=True))
    others = (draw_locations([25, 25], 40, seed=seed, step=step) for seed, step in ((1, 7), (0, 8)))
    assert not any(torch.equal(other, first[0]) for views in (*others, [first[1]]) for other in views)


def test_a_restored_run_draws_the_locations_of_its_next_step():
    generator = torch.Generator().manual_seed(1)
    z = [torch.randn(6, 5, generator=generator) for _ in range(2)]
    maps = [tuple(torch.randn(6, 5, side, side, generator=generator) for side in (3, 2)) for _ in range(2)]
    e, spec = Embeddings(z, z, z, maps=maps), METHODS["amdim"]
    run, resumed = (Objective(spec, spec.resolve({})) for _ in range(2))
    values = [run(e).loss.item() for _ in range(2)]
    resumed.load_state_dict(run.state_dict())
    assert resumed(e).loss.item() == run(e).loss.item() and len({*values, run(e).loss.item()}) == 3
    with pytest.raises(ValueError, match="method amdim needs the projected feature maps of each view"):
        run(Embeddings(z, z, z))


# --- several processes ----------------------------------------------------------------------------------------------


def _loss(comm, model, *inputs):
    """Two views, of which each part passes the model."""
    x = [inputs[0], inputs[1]]
    where = [i.squeeze(1) for i in inputs[2:]]
    maps = [model(view) for view in x]
    views = [
        AMDIMView(
            m, torch.stack([m, m.roll(1, 1), -m], 2), torch.stack([m, m.flip(1), m.square(), 1 - m, m.roll(2, 1)], 2)
        )
        for m in maps
    ]
    return amdim_loss(views, where, comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(4, 5), (7, 1, 3), (9, 0, 2)], ids=str)
def test_processes_with_unequal_rows_are_the_joined_batch(ranks, counts):
    rows = sum(counts)
    where = torch.randint(3, (rows, 2), generator=torch.Generator().manual_seed(0)).split(1, 1)
    assert_joined(ranks, _loss, [*toy_views(rows, 5), *where], counts)
