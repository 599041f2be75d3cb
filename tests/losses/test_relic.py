"""ReLIC: known values, slow reference, properties, gradients of every option, learned temperature, ranks, dtypes."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plugins.distributed import LOCAL
from plugins.losses import ReLICLoss, relic_loss, relic_terms
from plugins.losses.relic import KL, PAIRS, STOP
from plugins.methods import METHODS
from plugins.methods.relic import drawn_candidates
from plugins.objective import Objective
from plugins.spec import Embeddings, Hints
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views

OPTIONS = [dict(zip(("kl", "stop", "pairs"), each, strict=True)) for each in itertools.product(KL, STOP, PAIRS)]
SOME = [
    {},
    {"kl": "symmetric", "stop": "none", "pairs": "all"},
    {"kl": "column", "stop": "target"},
    {"kl": "column", "stop": "none", "pairs": "all"},
    {"stop": "entropy"},
]
SMALL = [  # with small crops
    {"alpha_small": 0.4},
    {"alpha_small": 2.0, "alpha": 0.0, "pairs": "all", "stop": "none"},
    {"alpha_small": 0.4, "kl": "symmetric", "stop": "entropy"},
    {"alpha_small": 0.4, "kl": "column", "stop": "none"},
]


def _sides(rows, width, views=2, large=2, seed=0):
    every = toy_views(rows, width, views=views + large, seed=seed)
    return every[:views], every[views:]


def _reference_relic(
    online, target, tau=0.2, alpha=1.0, kl="forward", stop="target", pairs="cross", candidates=None, alpha_small=0.0
):
    """Row by row, and pair by pair, in float64."""
    online, target = ([np.asarray(z.detach(), dtype=np.float64) for z in side] for side in (online, target))
    online, target = (
        [z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in s] for s in (online, target)
    )
    n = len(online[0])
    columns = [range(n) if candidates is None else sorted({*candidates.tolist(), i}) for i in range(n)]

    def distribution(score, i):
        scores = np.array([score(i, j) / tau for j in columns[i]])
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def p(a, b, i):
        return distribution(lambda i, j: online[a][i] @ target[b][j], i)

    def column(a, b, i):
        return distribution(lambda i, j: online[a][j] @ target[b][i], i)

    def divergence(first, second):
        return float(np.sum(first * (np.log(first) - np.log(second))))

    views, large = range(len(online)), range(len(target))
    ordered = [(a, b) for a in views for b in large if a != b or pairs == "all"]
    contrastive = np.mean([-np.log(p(a, b, i)[list(columns[i]).index(i)]) for a, b in ordered for i in range(n)])
    if kl == "column":
        found = [divergence(column(a, b, i), p(a, b, i)) for a, b in ordered for i in range(n)]
    else:
        both = [(a, b) for a in large for b in large if (a < b or (kl == "symmetric" and a != b))]
        found = [divergence(p(a, b, i), p(b, a, i)) for a, b in both for i in range(n)]
    triples = [(a, b, s) for a in large for b in large if a != b for s in views if s not in large]
    small = [divergence(p(a, b, i), p(s, b, i)) for a, b, s in triples for i in range(n)]
    return contrastive + alpha * (np.mean(found) if found else 0.0) + alpha_small * (np.mean(small) if small else 0.0)


def _plain(
    online, target, tau=0.2, alpha=1.0, kl="forward", stop="target", pairs="cross", candidates=None, alpha_small=0.0
):
    """The formula with N x N matrices, left to autograd."""
    q, t = ([torch.nn.functional.normalize(z, dim=1) for z in side] for side in (online, target))
    n = len(q[0])
    allowed = torch.ones(n, n, dtype=torch.bool)
    if candidates is not None:
        allowed = torch.zeros(n, n, dtype=torch.bool)
        allowed[:, candidates] = True
        allowed |= torch.eye(n, dtype=torch.bool)

    def logs(matrix):
        return (matrix / tau).masked_fill(~allowed, -1e9).log_softmax(1)

    def divergence(log_p, log_r):
        first = log_p.detach() if stop == "target" else log_p
        p = first.exp()
        entropy = (p * first).sum(1)
        return ((entropy.detach() if stop == "entropy" else entropy) - (p * log_r).sum(1)).mean()

    ordered = [(a, b) for a in range(len(q)) for b in range(len(t)) if a != b or pairs == "all"]
    log_p = {(a, b): logs(q[a] @ t[b].T) for a, b in {*ordered, *((a, b) for a, b in ordered if b < len(q))}}
    contrastive = sum(-log_p[pair].diagonal().mean() for pair in ordered) / len(ordered)
    if kl == "column":
        found = [divergence(logs((q[a] @ t[b].T).T), log_p[a, b]) for a, b in ordered]
    else:
        both = (
            itertools.permutations(range(len(t)), 2) if kl == "symmetric" else itertools.combinations(range(len(t)), 2)
        )
        found = [divergence(log_p[a, b], log_p[b, a]) for a, b in both]
    small = [
        (log_p[a, b].detach().exp() * (log_p[a, b].detach() - log_p[s, b])).sum(1).mean()
        for a, b in itertools.permutations(range(len(t)), 2)
        for s in range(len(t), len(q))
    ]
    loss = contrastive + alpha * (sum(found) / len(found) if found else 0.0)
    return loss + alpha_small * (sum(small) / len(small) if small else 0.0)


# --- values ---------------------------------------------------------------------------------------------------------


def _unit(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("width", "tau", "contrastive", "invariance"),
    [(128, 0.5, 5.561, 0.0310), (128, 1.0, 5.546, 0.00775), (256, 0.3, None, 0.0429), (256, 0.2, None, None)],
)
def test_random_unit_rows(width, tau, contrastive, invariance):
    """ln B + 1 / (2 d τ²), and (1 - 1/B) / (d τ²)."""
    views = [_unit(256, width, seed) for seed in range(4)]
    for kl in ("forward", "column"):
        terms = relic_terms(views[:2], views[2:], temperature=tau, kl=kl)
        assert terms.contrastive.item() == pytest.approx(math.log(256) + 1 / (2 * width * tau**2), abs=0.03)
        assert terms.invariance.item() == pytest.approx((1 - 1 / 256) / (width * tau**2), rel=0.06)
        if contrastive is not None:
            assert terms.contrastive.item() == pytest.approx(contrastive, abs=0.03)
        if invariance is not None:
            assert terms.invariance.item() == pytest.approx(invariance, rel=0.06)


def test_known_values():
    z = torch.eye(64, dtype=torch.float64)
    for kl, pairs in itertools.product(KL, PAIRS):
        terms = relic_terms([z, z], [z, z], temperature=0.1, kl=kl, pairs=pairs)
        assert terms.contrastive.item() == pytest.approx(0.0028561, abs=1e-7)
        assert terms.invariance.item() == pytest.approx(0, abs=1e-15), "identical views"
    for same in (torch.ones(2, 8, 3), torch.zeros(2, 8, 3)):
        terms = relic_terms(same, same)
        assert terms.contrastive.item() == pytest.approx(math.log(8), rel=1e-6), "collapse"
        assert terms.invariance.item() == pytest.approx(0, abs=1e-7)
    chosen = torch.tensor([1, 5, 6])
    assert relic_loss([z, z], [z, z], temperature=0.1, candidates=chosen).item() == pytest.approx(
        (3 * math.log(1 + 2 * math.exp(-10)) + 61 * math.log(1 + 3 * math.exp(-10))) / 64, rel=1e-10
    )


_SHAPES = [*itertools.product(OPTIONS, [(2, 2), (3, 2), (3, 3), (3, 1)]), *itertools.product(SMALL, [(5, 3), (3, 1)])]


@pytest.mark.parametrize(("options", "shape"), _SHAPES, ids=str)
def test_equals_slow_reference(shape, options):
    online, target = _sides(6, 5, *shape)
    for chosen in (None, torch.tensor([4, 0, 2])):
        given = {**{"alpha": 0.7, "candidates": chosen}, **options}
        expected = _reference_relic(online, target, 0.3, **given)
        assert relic_loss(online, target, temperature=0.3, **given).item() == pytest.approx(expected, rel=1e-10)
        singles = [z.float() for z in online], [z.float() for z in target]
        assert relic_loss(*singles, temperature=0.3, **given).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert _plain(online, target, 0.3, **given).item() == pytest.approx(expected, rel=1e-10)


def test_one_target_of_one_view_with_itself():
    online, target = _sides(6, 5, 1, 1)
    assert relic_loss(online, target, pairs="all").item() == pytest.approx(
        _reference_relic(online, target, pairs="all"), rel=1e-12
    )


def test_terms_and_module():
    online, target = _sides(6, 4, 3)
    online[0].requires_grad_()
    terms = relic_terms(online, target, alpha=0.3)
    assert terms.loss.item() == pytest.approx(terms.contrastive.item() + 0.3 * terms.invariance.item())
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    assert terms.temperature.item() == pytest.approx(0.2)
    module = ReLICLoss(temperature=0.3, alpha=0.5, kl="symmetric", stop="none", pairs="all")
    given = {"temperature": 0.3, "alpha": 0.5, "kl": "symmetric", "stop": "none", "pairs": "all"}
    assert torch.equal(module(online, target), relic_loss(online, target, **given))
    chosen = torch.tensor([1, 2])
    assert torch.equal(module(online, target, chosen), relic_loss(online, target, **given, candidates=chosen))
    assert "temperature=0.3, alpha=0.5, alpha_small=0.0, kl='symmetric', stop='none', pairs='all'" in repr(module)
    assert not [*module.parameters()]


# --- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 7),
    width=st.integers(1, 6),
    exponent=st.integers(-4, 4),
    tau=st.floats(0.05, 2),
    seed=st.integers(0, 99),
)
def test_the_invariance_is_never_negative(rows, width, exponent, tau, seed):
    online, target = ([10.0**exponent * z for z in side] for side in _sides(rows, width, seed=seed))
    for kl in KL:
        terms = relic_terms(online, target, temperature=tau, kl=kl)
        assert terms.invariance >= -1e-14 and terms.contrastive >= 0
        assert terms.loss.item() == pytest.approx(_reference_relic(online, target, tau, kl=kl), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("options", SOME, ids=str)
def test_invariances(options):
    online, target = _sides(7, 5)
    loss = relic_loss(online, target, **options).item()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(toy_views(5, 5, views=1)[0])
    assert relic_loss([z[order] for z in online], [z[order] for z in target], **options).item() == pytest.approx(loss)
    assert relic_loss(
        [z @ rotation for z in online], [z @ rotation for z in target], **options
    ).item() == pytest.approx(loss)
    assert relic_loss([3 * z for z in online], [z / 7 for z in target], **options).item() == pytest.approx(loss)
    assert relic_loss(online, [z[order] for z in target], **options).item() != pytest.approx(loss, rel=1e-3)


def test_without_alpha_it_is_the_contrastive_term_to_the_bit():
    online, target = ([z.float().requires_grad_() for z in side] for side in _sides(9, 5))
    bare = relic_terms(online, target, alpha=0.0)
    assert torch.equal(bare.loss.detach(), bare.contrastive)
    leaves = [*online, *target]
    expected = torch.autograd.grad(bare.loss, leaves)
    for options in ({"kl": "symmetric"}, {"stop": "none"}):
        found = torch.autograd.grad(relic_loss(online, target, alpha=0.0, **options), leaves)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_targets_of_the_network_itself_make_the_column_form_the_divergence():
    """S_21 is S_12 transposed: KL(C_12 || P_12) = KL(P_21 || P_12)."""
    z = toy_views(8, 5)
    column = relic_terms(z, z, kl="column").invariance.item()
    assert column == pytest.approx(relic_terms(z, z, kl="symmetric").invariance.item(), rel=1e-13)


def test_the_first_argument_of_a_stopped_divergence_gets_no_gradient():
    online, target = _sides(6, 4)
    online = [z.requires_grad_() for z in online]

    def gradients(**options):
        full = torch.autograd.grad(relic_loss(online, target, **options), online)
        bare = torch.autograd.grad(relic_loss(online, target, alpha=0.0), online)
        return [(one - other).abs().max().item() for one, other in zip(full, bare, strict=True)]

    first, second = gradients(stop="target")
    assert first < 1e-15 and second > 1e-4
    assert min(gradients(stop="entropy")) > 1e-4 and min(gradients(stop="none")) > 1e-4


def test_the_invariance_of_small_crops():
    """The term compares small crops with other large views, which get no gradient; it is 0 for equal crops."""
    online, target = _sides(7, 4, 4, 2)
    online = [z.requires_grad_() for z in online]
    bare, whole = (relic_terms(online, target, alpha_small=weight) for weight in (0.0, 0.5))
    assert bare.invariance_small == 0 < whole.invariance_small
    assert (whole.contrastive - bare.contrastive).abs() < 1e-14 and (whole.invariance - bare.invariance).abs() < 1e-14
    torch.testing.assert_close(whole.loss, bare.loss + 0.5 * whole.invariance_small)
    added = torch.autograd.grad(whole.loss - bare.loss, online)
    assert [bool(gradient.abs().max() > 1e-4) for gradient in added] == [False, False, True, True]
    assert max(gradient.abs().max() for gradient in added[:2]) < 1e-14
    # P_sb = P_ab if the crop's prediction is that of the large view a
    same = relic_terms([online[0], online[0], online[0]], target, alpha_small=1.0)
    assert same.invariance_small.abs() < 1e-15
    for views, large in ((2, 2), (3, 1)):  # nothing to compare
        online, target = _sides(5, 4, views, large)
        assert torch.equal(relic_loss(online, target, alpha_small=3.0), relic_loss(online, target))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "shape"), [case for case in _SHAPES if case[1] != (3, 3)], ids=str)
def test_gradient_is_that_of_autograd(shape, options):
    """Compare the gradients of predictions, of targets with a gradient (``target=self``), and of the temperature."""
    online, target = ([z.requires_grad_() for z in side] for side in _sides(6, 4, *shape))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for chosen in (None, torch.tensor([3, 0, 5])):
        given = {**{"alpha": 0.7, "candidates": chosen}, **options}
        leaves = [*online, *target, tau]
        expected = torch.autograd.grad(_plain(online, target, tau, **given), leaves, allow_unused=True)
        found = torch.autograd.grad(3 * relic_loss(online, target, temperature=tau, **given), leaves)
        for one, other in zip(found, expected, strict=True):
            other = torch.zeros_like(one) if other is None else 3 * other
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
        for gradient, z in zip(found, [*online, *target], strict=False):
            assert (gradient * z).sum(1).abs().max() < 1e-13, "orthogonal to the rows"
        detached = [z.detach() for z in target]
        of_online = torch.autograd.grad(relic_loss(online, detached, temperature=0.3, **given), online)
        for one, other in zip(of_online, found, strict=False):
            torch.testing.assert_close(3 * one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("options", [*SOME, SMALL[0]], ids=str)
def test_rows_of_several_blocks(options):
    views = 3 if "alpha_small" in options else 2
    online, target = ([z.requires_grad_() for z in side] for side in _sides(1100, 4, views))
    chosen = torch.arange(0, 1100, 7)
    for each in (options, {"candidates": chosen, **options}):
        leaves = [*online, *target]
        loss, expected = relic_loss(online, target, **each), _plain(online, target, **each)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
        grads = (torch.autograd.grad(value, leaves, allow_unused=True) for value in (loss, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-7, atol=1e-14)


def test_gradcheck():
    leaves = [z.requires_grad_() for side in _sides(4, 3) for z in side]
    for options in ({}, {"kl": "symmetric", "stop": "none"}):
        if options:  # with "target" the divergence is not the one that is differentiated
            assert torch.autograd.gradcheck(lambda *z, o=options: relic_loss(z[:2], z[2:], **o), leaves)


def test_no_gradient_is_made_where_none_is_wanted():
    online, target = _sides(5, 4)
    assert not relic_loss(online, target).requires_grad
    online[0].requires_grad_()
    with torch.no_grad():
        assert not relic_loss(online, target).requires_grad
    target = [z.requires_grad_() for z in target]
    assert relic_loss([online[0].detach(), online[1]], target).requires_grad, "of the targets alone"


# --- learned temperature --------------------------------------------------------------------------------------------


def test_a_learned_temperature_is_a_parameter_with_a_bound():
    online, target = _sides(8, 5)
    module = ReLICLoss(temperature=1.0, learn_temperature=True, min_temperature=0.2).double()
    assert [name for name, _ in module.named_parameters()] == ["log_scale"]
    assert module(online, target).item() == pytest.approx(relic_loss(online, target, temperature=1.0).item())
    (gradient,) = torch.autograd.grad(module(online, target), module.log_scale)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(_plain(online, target, 1 / log_scale.exp()), log_scale)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        module.log_scale.fill_(2.0)  # exp(2) = 7.4
    loss = module(online, target)
    assert loss.item() == pytest.approx(relic_loss(online, target, temperature=0.2).item())
    assert module.terms(online, target).temperature.item() == pytest.approx(0.2)
    assert torch.autograd.grad(loss, module.log_scale)[0] == 0
    assert "temperature=1.0 (learned, at least 0.2)" in repr(module)
    with pytest.raises(ValueError, match=r"a learned temperature must begin above min_temperature, 0.2, .* got 0.2"):
        ReLICLoss(learn_temperature=True, min_temperature=0.2)


# --- the methods ----------------------------------------------------------------------------------------------------


def _embeddings(rows=8, views=3):
    every = toy_views(rows, 4, views=2 * views + 2)
    return Embeddings(every[:views], every[views : 2 * views], every[2 * views :])


def _criterion(name="relic", comm=LOCAL, **options):
    return METHODS[name].loss(METHODS[name].resolve(options), comm)


def test_the_method_compares_predictions_with_targets():
    e = _embeddings()
    assert torch.equal(_criterion(temperature=0.3)(e).loss, relic_loss(e.p, e.target, temperature=0.3))
    own = _criterion(target="self", kl="symmetric", stop="none")
    z = [view.requires_grad_() for view in e.z]
    e = e._replace(p=z)
    loss, expected = own(e).loss, relic_loss(z, z[:2], kl="symmetric", stop="none")
    assert torch.equal(loss, expected)
    plain = _plain(z, z[:2], kl="symmetric", stop="none")
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(plain, z))


def test_without_a_predictor_the_predictions_are_the_projections():
    spec = METHODS["relic"]
    predictor = spec.predictor(spec.resolve({"predictor": "none"}), LOCAL)
    z = toy_views(4, 3)
    assert predictor.predict(z) is z and not predictor.state_dict()
    assert spec.predictor(spec.resolve({}), LOCAL).state_dict()


def test_a_subset_is_that_of_seed_and_step_and_of_all_micro_batches():
    e = _embeddings(20)

    def run(criterion, *, micro_batches=1):
        clock = criterion.clock
        for _ in range(3):
            clock.before_step()
            found = [criterion(e).loss.item() for _ in range(micro_batches)]
            assert len(set(found)) == 1
            yield found[0]
            clock.after_step()

    options = {"num_negatives": 3, "pairs": "cross", "stop": "target"}
    first = [*run(_criterion("relicv2", **options))]
    assert first == [*run(_criterion("relicv2", **options), micro_batches=2)]
    expected = [relic_loss(e.p, e.target, candidates=drawn_candidates(20, 3, 0, step)).item() for step in range(3)]
    assert first == expected and len({*expected}) == 3
    assert first != [*run(_criterion("relicv2", negatives_seed=1, **options))]
    resumed = _criterion("relicv2", **options)
    resumed.load_state_dict({"clock.steps": torch.tensor(1)})
    assert [*run(resumed)][:2] == expected[1:]
    assert _criterion("relicv2", num_negatives=20, pairs="cross")(e).loss == relic_loss(e.p, e.target, stop="entropy")
    assert not _criterion().state_dict()


def test_draws_are_distinct_and_even():
    counts = torch.zeros(20)
    for step in range(400):
        drawn = drawn_candidates(20, 5, 3, step)
        assert len(drawn.unique()) == 5
        counts[drawn] += 1
    assert counts.min() > 60 and counts.max() < 140
    assert len(drawn_candidates(4, 5, 0, 0)) == 4


def test_the_methods_learn_a_temperature():
    criterion = _criterion(temperature=1.0, learn_temperature=True, min_temperature=0.2)
    assert [name for name, _ in criterion.named_parameters()] == ["loss.log_scale"]
    criterion(_embeddings()).loss.backward()
    assert criterion.loss.log_scale.grad != 0
    assert criterion(_embeddings()).temperature.item() == pytest.approx(1)


def test_a_learned_temperature_is_trained_without_decay():
    spec = METHODS["relic"]
    for learned in (False, True):
        options = spec.resolve({"learn_temperature": learned, "pred_lr_scale": 3.0})
        objective = Objective(spec, options)
        groups = {group.name: group for group in objective.groups}
        assert [*groups] == ["loss"] * learned
        if learned:
            assert [*groups["loss"].parameters] == ["loss.loss.log_scale"]
            assert groups["loss"].hints == Hints(no_decay=True)
    assert spec.hints(options)["predictor"].lr_scale == 3


def _drawn_step(comm, model, *x):
    criterion = _criterion("relicv2", comm, num_negatives=3)
    z = [model(each) for each in x]
    return criterion(Embeddings(z, z, [view.detach().flip(1) for view in z[:2]])).loss


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 3), (2, 5, 1)])
def test_every_process_draws_the_same_rows_of_the_joined_batch(ranks, counts):
    assert_joined(ranks, _drawn_step, toy_views(sum(counts), 5, views=3), counts)


# --- ranks ----------------------------------------------------------------------------------------------------------


def _ema_step(comm, model, *x, **options):
    with torch.no_grad():
        target = [model(each.flip(1)) for each in x[:2]]
    return relic_loss([model(each) for each in x], target, comm=comm, **options)


def _self_step(comm, model, *x, **options):
    z = [model(each) for each in x]
    return relic_loss([each.tanh() for each in z], z[:2], comm=comm, **options)


def _column_step(comm, model, *x):
    return _ema_step(comm, model, *x, kl="column")


def _column_entropy_step(comm, model, *x):
    return _ema_step(comm, model, *x, kl="column", stop="entropy")


def _column_self_step(comm, model, *x):
    return _self_step(comm, model, *x, kl="column", stop="none", pairs="all")


def _small_step(comm, model, *x):
    return _ema_step(comm, model, *x, alpha_small=0.5)


def _subset_step(comm, model, *x):
    return _ema_step(comm, model, *x, pairs="all", alpha_small=0.5, candidates=torch.tensor([5, 0, 3]))


def _subset_self_step(comm, model, *x):
    options = {"kl": "column", "stop": "none", "candidates": torch.tensor([5, 0, 3]), "alpha_small": 0.5}
    return _self_step(comm, model, *x, **options)


class _WithTemperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = toy_mlp(5)
        self.loss = ReLICLoss(temperature=0.5, learn_temperature=True, stop="entropy").double()


def _learned_step(comm, model, *x):
    model.loss.comm = comm
    return model.loss([model.model(each) for each in x], [model.model(each).detach() for each in x[:2]])


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 3), (3, 5), (2, 5, 1), (8, 0)])
@pytest.mark.parametrize(
    "step",
    [
        _ema_step,
        _small_step,
        _self_step,
        _column_step,
        _column_entropy_step,
        _column_self_step,
        _subset_step,
        _subset_self_step,
    ],
)
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts)


@pytest.mark.ddp
def test_ranks_equal_the_joined_batch_with_a_learned_temperature(ranks):
    assert_joined(ranks, _learned_step, toy_views(8, 5, views=3), (5, 3), build=_WithTemperature)


def _traffic(comm, online, target, options):
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        loss = relic_loss([z.requires_grad_() for z in online], target, comm=comm, **options)
        forward = sent.copy()
        loss.backward()
    return forward, len(sent) - len(forward)


@pytest.mark.ddp
def test_sends_the_targets_and_nothing_in_backward(ranks):
    online, target = _sides(12, 20)
    parts = [([z[r] for z in online], [z[r] for z in target]) for r in (slice(0, 6), slice(6, 12))]
    assert ranks.run(_traffic, [(*part, {}) for part in parts]) == [([2, 2 * 6 * 20, 3], 0)] * 2
    column = {"kl": "column", "stop": "target"}
    assert ranks.run(_traffic, [(*part, column) for part in parts]) == [([2, 4 * 6 * 20, 3], 0)] * 2


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for online, target, message in [
        ([z], [z], "the ReLIC loss needs at least 2 online views and 1 to as many targets, got 1 and 1"),
        ([z] * 2, [z] * 3, "the ReLIC loss needs at least 2 online views and 1 to as many targets, got 2 and 3"),
        ([z] * 2, [], "the ReLIC loss needs at least 2 online views and 1 to as many targets, got 2 and 0"),
        (z, [z], r"online .* pass a list of views, such as \[o0, o1\]"),
        ([z] * 2, [z, z[:, :2]], r"target\[1\] must have the shape of online\[0\], \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 2, [z[:1]] * 2, "the ReLIC loss needs at least 2 rows over all processes, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            relic_loss(online, target)
    for options, message in [
        ({"temperature": 0.0}, r"temperature must be in \[1e-06, inf\), got 0.0"),
        ({"alpha": -1.0}, r"alpha must be in \[0, inf\), got -1.0"),
        ({"alpha_small": -1.0}, r"alpha_small must be in \[0, inf\), got -1.0"),
        ({"kl": "row"}, "kl must be one of forward, symmetric, column, got 'row'"),
        ({"stop": "all"}, "stop must be one of target, entropy, none, got 'all'"),
        ({"pairs": "own"}, "pairs must be one of cross, all, got 'own'"),
    ]:
        for make in (ReLICLoss, lambda **options: relic_loss([z] * 2, [z] * 2, **options)):
            with pytest.raises(ValueError, match=message):
                make(**options)
    for candidates, message in [
        (torch.tensor([0, 4]), r"candidates must be distinct indices from 0 to 3, got \[0, 4\]"),
        (torch.tensor([1, 1]), r"candidates must be distinct indices from 0 to 3, got \[1, 1\]"),
        (torch.tensor([0.0]), r"candidates must be int64 indices \[K\], K >= 1, got torch.float32 of shape \(1,\)"),
        (torch.tensor([], dtype=torch.int64), "candidates must be int64 indices .* got torch.int64 of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            relic_loss([z] * 2, [z] * 2, candidates=candidates)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_batches_are_finite(kind, options, device):
    for shape, dtype in itertools.product([(2, 5), (32, 8)], [torch.float32, torch.bfloat16, torch.float16]):
        views = [z.to(device, dtype) for seed in (0, 1) for z in difficult_views(kind, *shape, seed=seed)]
        leaves = [z.clone().float().requires_grad_() for z in views]
        for chosen in (None, torch.tensor([1], device=device)):
            loss = relic_loss(leaves[:2], leaves[2:], candidates=chosen, **options)
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))
            half = relic_loss(views[:2], views[2:], candidates=chosen, **options)
            assert half.dtype == torch.float32
            doubles = [z.double().cpu() for z in views]
            expected = _reference_relic(doubles[:2], doubles[2:], candidates=chosen and chosen.cpu(), **options)
            assert half.item() == pytest.approx(expected, rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    online, target = ([z.to(dtype) for z in side] for side in _sides(64, 40))
    with torch.autocast("cpu", dtype=dtype):
        loss = relic_loss(online, target)
    doubles = [z.double() for z in online], [z.double() for z in target]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(_reference_relic(*doubles), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kl": "column", "stop": "none", "candidates": torch.tensor([1, 3])}], ids=str)
def test_compiles_to_one_graph(options):
    online, target = ([z.float().requires_grad_() for z in side] for side in _sides(8, 6))
    compiled = torch.compile(relic_loss, fullgraph=True, backend="aot_eager")
    expected, found = relic_loss(online, target, **options), compiled(online, target, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = [*online, *target]
    grads = (torch.autograd.grad(value, leaves) for value in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
