"""PIRL: known values, slow reference, VISSL's loss, draws, gradients, memory, ranks, dtypes."""

import copy
import importlib
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plugins.checks import NotFiniteError
from plugins.distributed import LOCAL
from plugins.losses import PIRLLoss, draw_negatives, pirl_loss, pirl_terms
from plugins.methods import METHODS
from plugins.objective import Objective, embed, encode
from plugins.targets import IndexedBank
from plugins.testing import DIFFICULT, assert_joined, difficult_views, toy_views

FORMS = ("info_nce", "nce", "nce_paper")
SIZE = 11
EPS = float(np.finfo(np.float32).eps)


def _inputs(rows=5, width=4, size=SIZE, negatives=3, seed=0, two=False):
    """z_image, z_patches, index, bank and negatives."""
    generator = torch.Generator().manual_seed(seed)
    image, patches = toy_views(rows, width, seed=seed)
    index = torch.randperm(size, generator=generator)[:rows]
    chosen = torch.randint(size, (2, rows, negatives) if two else (rows, negatives), generator=generator)
    return image, patches, index, IndexedBank(size, width), chosen


def _reference(image, patches, index, bank, negatives, *, tau=0.1, weight=0.5, form="info_nce", log_z=None):
    """Row by row and score by score from the definitions, in float64: loss, patch term, image term, ln Z."""
    rows = bank.rows.double().numpy()
    size = len(rows)

    def scores(z, i, chosen):
        u = z / math.sqrt(float(z @ z))
        return [float(u @ rows[k]) / tau for k in (i, *chosen)]

    pair = negatives.numpy() if negatives.ndim == 3 else np.stack([negatives.numpy()] * 2)
    table = [
        [scores(z, i, chosen) for z, i, chosen in zip(view.double().numpy(), index.tolist(), chosen_of, strict=True)]
        for view, chosen_of in zip((patches, image), pair, strict=True)
    ]
    if log_z is None:
        log_z = math.log(size * np.mean([math.exp(s) for row in table[0] for s in row]))

    def loss(s):
        e, count = [math.exp(x) for x in s], len(s) - 1
        if form == "info_nce":
            return -math.log(e[0] / sum(e))
        if form == "nce":
            noise, p = count / size, [x / math.exp(log_z) for x in e]
            value = -math.log(p[0] / (p[0] + noise + EPS))
            return value - sum(math.log(noise / (x + noise + EPS)) for x in p[1:])
        h = [x / (x + sum(e[1:])) for x in e]
        return -math.log(h[0]) - sum(math.log(1 - x) for x in h[1:])

    terms = [np.mean([loss(s) for s in side]) for side in table]
    return weight * terms[0] + (1 - weight) * terms[1], *terms, log_z


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("two", [False, True])
def test_equals_the_slow_reference(form, two):
    for seed, tau, weight in itertools.product(range(3), (0.07, 0.5), (0.0, 0.3, 1.0)):
        image, patches, index, bank, negatives = _inputs(seed=seed, two=two)
        expected = _reference(image, patches, index, bank, negatives, tau=tau, weight=weight, form=form)
        options = {"negatives": negatives, "temperature": tau, "patch_weight": weight, "form": form}
        terms = pirl_terms(image, patches, index, bank, **options)
        # in the definitions 1 - h cancels, not in the loss
        assert [x.item() for x in terms[:3]] == pytest.approx(expected[:3], rel=1e-7 if form == "nce_paper" else 1e-10)
        if form == "nce":
            assert terms.log_normalizer.item() == pytest.approx(expected[3], rel=1e-12)
        single = pirl_loss(image.float(), patches.float(), index, bank, **options)
        assert single.dtype == torch.float32 and single.item() == pytest.approx(expected[0], rel=1e-4, abs=1e-5)


def test_a_given_normaliser_is_kept():
    image, patches, index, bank, negatives = _inputs()
    expected = _reference(image, patches, index, bank, negatives, form="nce", log_z=3.0)[0]
    given = {"negatives": negatives, "form": "nce", "log_normalizer": torch.tensor(3.0, dtype=torch.float64)}
    assert pirl_loss(image, patches, index, bank, **given).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_equal_scores(form):
    """ln(K + 1), and K ln((K + 1) / K) more for NCE if Z is of the same batch, and about n ε for VISSL's ε."""
    bank = IndexedBank(2000, 4)
    bank.rows.copy_(torch.eye(4)[0].expand_as(bank.rows))
    z = torch.eye(4, dtype=torch.float64)[:2]
    found = pirl_loss(z[:1], z[:1], torch.tensor([7]), bank, num_negatives=1000, form=form).item()
    expected = math.log(1001) + (form != "info_nce") * 1000 * math.log(1001 / 1000)
    assert found == pytest.approx(expected + (form == "nce") * 2000 * EPS, abs=1e-6)
    assert expected == pytest.approx(6.9088 if form == "info_nce" else 7.9083, abs=1e-4)


@pytest.mark.parametrize(
    ("form", "count", "expected"),
    [("info_nce", 1000, 7.706), ("info_nce", 4096, 9.115), ("nce", 1000, 8.705), ("nce", 4096, 10.115)],
)
def test_random_unit_vectors(form, count, expected):
    """ln(K + 1) + 1 / (2 d τ²), ln K + 1 + 1 / (2 d τ²) for NCE, at d = 128, τ = 0.07."""
    generator = torch.Generator().manual_seed(1)  # 0 is the bank's
    image, patches = torch.randn(2, 256, 128, generator=generator)
    bank = IndexedBank(6000, 128)
    index = torch.arange(256)
    found = pirl_loss(image, patches, index, bank, num_negatives=count, temperature=0.07, form=form).item()
    base = math.log(count + 1) if form == "info_nce" else math.log(count) + 1
    assert base + 1 / (2 * 128 * 0.07**2) == pytest.approx(expected, abs=1e-3)
    assert found == pytest.approx(expected, abs=0.1)


def test_one_bank_for_images_and_patches():
    """The patches are compared with the bank, not with the image: each term has one argument."""
    image, patches, index, bank, negatives = _inputs()
    terms = pirl_terms(image, patches, index, bank, negatives=negatives)
    other = pirl_terms(image.flip(0), patches, index, bank, negatives=negatives)
    assert other.patches.item() == terms.patches.item() and other.image.item() != terms.image.item()
    swapped = pirl_terms(patches, image, index, bank, negatives=negatives)
    assert swapped.image.item() == terms.patches.item()
    assert terms.loss.item() == pytest.approx((terms.patches.item() + terms.image.item()) / 2)
    cosines = (F.normalize(image, dim=1) * bank.rows[index]).sum(1)
    assert terms.similarity.item() == pytest.approx(cosines.mean().item())


# --- VISSL's loss ---------------------------------------------------------------------------------------------------


@pytest.mark.vissl
@pytest.mark.parametrize(("form", "name"), [("nce", "nce"), ("info_nce", "cross_entropy")])
def test_equals_vissls_loss_in_two_steps(form, name, monkeypatch):
    """Values, gradients, Z and the memory after each step, on the same negatives."""
    importlib.import_module("vissl_ext")  # patches VISSL before it is imported
    from vissl.config import AttrDict
    from vissl.losses.nce_loss import NCEAverage, NCELossWithMemory

    config = {
        "norm_embedding": True,
        "temperature": 0.07,
        "loss_weights": [0.3, 0.7],
        "norm_constant": -1,
        "loss_type": name,
        "update_mem_with_emb_index": 1,
        "num_train_samples": SIZE,
        "negative_sampling_params": {"num_negatives": 6, "type": "random"},
        "memory_params": {"embedding_dim": 8, "momentum": 0.5, "norm_init": True, "update_mem_on_forward": False},
    }
    stock = NCELossWithMemory(AttrDict(config))
    bank = IndexedBank(SIZE, 8, momentum=0.5)
    stock.nce_average.memory.copy_(bank.rows)
    ours = PIRLLoss(bank, temperature=0.07, patch_weight=0.3, form=form)
    for step in range(2):
        image, patches, index, _, negatives = _inputs(width=8, negatives=6, seed=step, two=True)
        columns = iter(torch.cat([index[:, None], chosen], 1) for chosen in negatives)
        monkeypatch.setattr(NCEAverage, "do_negative_sampling", lambda self, *_, queue=columns, **__: next(queue))
        sides = [view.float().requires_grad_() for view in (image, patches)]
        expected = stock([sides[1], sides[0]], index)
        wanted = torch.autograd.grad(expected, sides)
        terms = ours.terms(*sides, index, negatives)
        assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(torch.autograd.grad(terms.loss, sides), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bank.rows, stock.nce_average.memory, rtol=1e-5, atol=1e-6)
        if form == "nce":
            assert ours.log_normalizer.exp().item() == pytest.approx(stock.nce_average.params[2].item(), rel=1e-5)


# --- draws ----------------------------------------------------------------------------------------------------------


def test_offset_draws_are_distinct_and_never_the_image_itself():
    index = torch.arange(50)
    drawn = draw_negatives(index, 50, 20, step=3)
    assert drawn.shape == (50, 20) and drawn.min() >= 0 and drawn.max() < 50
    assert not (drawn == index[:, None]).any()
    assert all(len(set(row)) == 20 for row in drawn.tolist())
    everything = draw_negatives(index, 50, 4096)
    assert everything.shape == (50, 49), "all others, if there are fewer than K"
    seen = torch.stack([draw_negatives(torch.tensor([7]), 50, 5, step=step)[0] for step in range(3000)])
    counts = seen.flatten().bincount(minlength=50)
    expected = 3000 * 5 / 49
    assert counts[7] == 0 and (counts[counts > 0] - expected).abs().max() < 5 * expected**0.5 and len(counts) == 50


def test_vissls_draws_are_uniform_and_may_be_the_image_itself():
    """P(own index among K) = 1 - (1 - 1/n)^K, 50 % for n = 1437 and K = 1000."""
    index = torch.tensor([3, 3, 8])
    drawn = torch.stack([draw_negatives(index, 40, 10, sampling="vissl", step=step) for step in range(3000)])
    assert drawn.shape == (3000, 2, 3, 10) and torch.equal(drawn[:, :, 0], drawn[:, :, 1])
    assert not torch.equal(drawn[:, 0], drawn[:, 1]), "each term has a draw of its own"
    share = (drawn[:, 0, 2] == 8).any(1).double().mean().item()
    assert share == pytest.approx(1 - (1 - 1 / 40) ** 10, abs=4 * (0.25 / 3000) ** 0.5)
    assert pytest.approx(0.5, abs=0.01) == 1 - (1 - 1 / 1437) ** 1000
    counts = drawn[:, 1, 0].flatten().bincount(minlength=40)
    assert (counts - 750).abs().max() < 5 * 750**0.5


@pytest.mark.parametrize("sampling", ["offset", "vissl"])
def test_draws_depend_on_seed_step_and_image_alone(sampling):
    options = {"sampling": sampling, "seed": 1, "step": 2}
    both = draw_negatives(torch.tensor([4, 9]), 30, 6, **options)
    torch.manual_seed(5)
    assert torch.equal(draw_negatives(torch.tensor([9]), 30, 6, **options), both[..., 1:, :])
    for other in ({"seed": 2}, {"step": 3}):
        assert not torch.equal(draw_negatives(torch.tensor([4, 9]), 30, 6, **{**options, **other}), both)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    image, patches, index, bank, negatives = _inputs(two=True)
    log_z = torch.tensor(2.5, dtype=torch.float64)
    free = [image.requires_grad_(), patches.requires_grad_()]

    def loss(*z):
        options = {"negatives": negatives, "temperature": 0.3, "form": form, "log_normalizer": log_z}
        return pirl_loss(*z, index, bank, patch_weight=0.3, **options)

    assert torch.autograd.gradcheck(loss, free)
    for z, gradient in zip(free, torch.autograd.grad(loss(*free), free), strict=True):
        assert (z * gradient).sum(1).abs().max() < 1e-14, "the length of a row does not matter"


def test_z_of_the_batch_is_a_constant():
    """The gradient of the score s_0 is -σ(c - s_0), that of s_k is σ(s_k - c): Z has no derivative."""
    image, patches, index, bank, negatives = _inputs()
    patches.requires_grad_()
    options = {"negatives": negatives, "form": "nce", "patch_weight": 1.0}
    terms = pirl_terms(image, patches, index, bank, **options)
    again = pirl_loss(image, patches, index, bank, **options, log_normalizer=terms.log_normalizer)
    assert torch.equal(*(torch.autograd.grad(loss, patches)[0] for loss in (terms.loss, again)))
    assert not terms.log_normalizer.requires_grad


@pytest.mark.parametrize(("weight", "dead"), [(0.0, 1), (1.0, 0)])
def test_a_weight_of_zero_gives_a_head_no_gradient(weight, dead):
    image, patches, index, bank, _ = _inputs()
    sides = [image.requires_grad_(), patches.requires_grad_()]
    loss = PIRLLoss(bank, patch_weight=weight)
    before = bank.rows.clone()
    gradients = torch.autograd.grad(loss(*sides, index), sides, allow_unused=True)
    assert gradients[dead] is None or not gradients[dead].any()
    assert gradients[1 - dead].abs().max() > 1e-3
    assert not torch.equal(bank.rows, before), "the image's outputs move the bank in any case"


def test_the_loss_falls_and_images_separate():
    """Embeddings that are optimised directly approach their rows of the bank: the loss is far below ln(K + 1)."""
    torch.manual_seed(0)
    z = torch.randn(2, 30, 8).requires_grad_()
    loss = PIRLLoss(IndexedBank(30, 8), num_negatives=29)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(z[0], z[1], torch.arange(30))
        value.backward()
        optimizer.step()
    assert value.item() < 0.3 * math.log(30)
    assert (F.normalize(z[0], dim=1) * loss.bank.rows).sum(1).min() > 0.9


# --- memory ---------------------------------------------------------------------------------------------------------


def test_both_terms_read_the_bank_before_the_image_moves_it():
    image, patches, index, bank, negatives = _inputs()
    expected = _reference(image, patches, index, copy.deepcopy(bank), negatives)[0]
    written = copy.deepcopy(bank)
    written.write(index, image)
    loss = PIRLLoss(bank)
    assert loss(image, patches, index, negatives).item() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(bank.rows, written.rows)


def test_the_function_and_evaluation_change_nothing():
    image, patches, index, bank, _ = _inputs()
    loss = PIRLLoss(bank, form="nce").eval()
    before = copy.deepcopy(loss.state_dict())
    loss(image, patches, index)
    pirl_loss(image, patches, index, bank)
    assert all(
        torch.equal(one, other)
        for one, other in zip(before.values(), loss.state_dict().values(), strict=True)
        if not one.isnan().any()
    )
    assert loss.log_normalizer.isnan()


def test_the_normaliser_is_that_of_the_first_step_in_training():
    image, patches, index, bank, negatives = _inputs()
    loss = PIRLLoss(bank, form="nce")
    expected = _reference(image, patches, index, bank, negatives, form="nce")[3]
    loss(image, patches, index, negatives)
    first = loss.log_normalizer.clone()
    assert first.item() == pytest.approx(expected, rel=1e-6)
    loss(patches, image, index, negatives)
    assert torch.equal(loss.log_normalizer, first)
    restored = PIRLLoss(IndexedBank(None, 4), form="nce")
    restored.load_state_dict(loss.state_dict())
    assert restored.terms(image, patches, index).log_normalizer.item() == first.item()


@pytest.mark.parametrize("form", ["info_nce", "nce"])
def test_micro_batches_are_one_step(form):
    """Same draws, the bank is written at the end of the step: loss and bank are those of the whole batch."""
    image, patches, index, bank, _ = _inputs(rows=6)
    log_z = torch.tensor(4.0)
    whole, parts = (PIRLLoss(copy.deepcopy(bank), form=form, num_negatives=5) for _ in range(2))
    for loss in (whole, parts):
        loss.log_normalizer.copy_(log_z)
    for _ in range(2):
        expected = whole(image, patches, index)
        for part in (parts, parts.clock):
            part.before_step()
        found = [parts(image[rows], patches[rows], index[rows]) for rows in (slice(0, 3), slice(3, 6))]
        for part in (parts, parts.clock):
            part.after_step()
        assert torch.stack(found).mean().item() == pytest.approx(expected.item(), rel=1e-10)
        torch.testing.assert_close(parts.bank.rows, whole.bank.rows, rtol=1e-6, atol=1e-7)
    assert parts.clock.steps == whole.clock.steps == 2


def test_a_resumed_run_draws_and_computes_the_same():
    image, patches, index, bank, _ = _inputs()
    loss = PIRLLoss(bank, num_negatives=4, form="nce")
    for _ in range(3):
        loss(image, patches, index)
    resumed = PIRLLoss(IndexedBank(None, 4), num_negatives=4, form="nce")
    resumed.load_state_dict(loss.state_dict())
    for _ in range(2):
        assert resumed(image, patches, index).item() == loss(image, patches, index).item()
    assert torch.equal(resumed.bank.rows, loss.bank.rows)


def test_the_module_waits_for_the_device_in_its_first_step_only(monkeypatch):
    image, patches, index, bank, _ = _inputs()
    loss = PIRLLoss(bank, form="nce")
    loss(image, patches, index)

    def refuse(*_):
        raise AssertionError("a synchronisation")

    monkeypatch.setattr("plugins.losses.pirl.check_result", lambda *_, **__: None)  # it does nothing on a GPU
    for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    loss(image, patches, index)


# --- the method ------------------------------------------------------------------------------------------------------


def _method(seed=0, **options):
    torch.manual_seed(seed)
    spec = METHODS["pirl"]
    options = spec.resolve({"proj_hidden_dim": 16, "proj_output_dim": 8, "num_negatives": 6, **options})
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10), torch.nn.ReLU())
    head = spec.head(10, options)
    objective = Objective(spec, options, projector=head)
    return network, head, objective


def _train(network, head, objective, steps, pieces=4):
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(6, 3, 2, 2, generator=generator), torch.randn(6, pieces, 3, 2, 2, generator=generator)
        index = torch.randperm(20, generator=generator)[:6]
        objective.before_step()
        e = embed([encode(network, view) for view in views], head, large=1, index=index)
        optimizer.zero_grad()
        terms = objective(e)
        terms.loss.backward()
        optimizer.step()
        objective.after_step()
    return terms


@pytest.mark.parametrize("options", [{}, {"form": "nce", "sampling": "vissl"}, {"head": "linear"}, {"head": "mlp"}])
def test_the_method_resumes_to_the_same_bits(options):
    whole = _method(patches=4, **options)
    whole[2].allocate(20)
    _train(*whole, range(2))
    saved = [copy.deepcopy(part.state_dict()) for part in whole]
    expected = _train(*whole, range(2, 4))
    resumed = _method(seed=1, patches=4, **options)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    resumed[2].allocate(20)
    assert _train(*resumed, range(2, 4)) == expected
    assert all(p.grad is not None for p in whole[1].parameters())


def test_the_method_takes_a_turned_view_and_names_a_wrong_number_of_patches():
    turned = _method(patches=1)
    turned[2].allocate(20)
    assert _train(*turned, [0], pieces=1).loss.isfinite()
    nine = _method()
    nine[2].allocate(20)
    with pytest.raises(ValueError, match=r"stacks of 9 patches, got shape \(6, 4, 10\); set the option patches"):
        _train(*nine, [0])
    METHODS["pirl"].check_views(1, 0, 1)
    with pytest.raises(ValueError, match="needs 1 stack of patches"):
        METHODS["pirl"].check_views(1, 0, 0)


# --- several processes ----------------------------------------------------------------------------------------------


def _step(form, comm, model, image, patches, index):
    bank = IndexedBank(SIZE, 4)
    options = {"form": form, "num_negatives": 5, "temperature": 0.3, "step": 7}
    return pirl_loss(model(image), model(patches), index[:, 0].long(), bank, **options, comm=comm)


def _info_nce(*arguments):
    return _step("info_nce", *arguments)


def _nce(*arguments):
    return _step("nce", *arguments)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 3), (2, 5, 1), (0, 8)])
@pytest.mark.parametrize("step", [_info_nce, _nce])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    index = torch.tensor([4.0, 0, 9, 4, 1, 10, 7, 0])[:, None]
    assert_joined(ranks, step, [*toy_views(8, 5), index], counts)


def _run(comm, image, patches, index):
    loss = PIRLLoss(IndexedBank(SIZE, 4), form="nce", sampling="vissl", num_negatives=5, comm=comm)
    values = [loss(image, patches, index).item() for _ in range(3)]
    return values, loss.bank.rows, loss.log_normalizer


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 3), (2, 5, 1)])
def test_memories_of_all_ranks_equal_that_of_the_joined_batch(ranks, counts):
    image, patches = toy_views(8, 4)
    index = torch.tensor([4, 0, 9, 4, 1, 10, 7, 0])  # samplers repeat images
    values, rows, log_z = _run(LOCAL, image, patches, index)
    parts = zip(*(tensor.split(list(counts)) for tensor in (image, patches, index)), strict=True)
    for found, bank, normaliser in ranks.run(_run, list(parts)):
        assert found == pytest.approx(values, rel=1e-6)
        assert torch.equal(bank, rows)
        assert normaliser.item() == pytest.approx(log_z.item(), rel=1e-6)


# --- degenerate batches and mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_batches_are_finite(form, dtype):
    bank = IndexedBank(SIZE, 6)
    for kind, rows in itertools.product(DIFFICULT, (1, 4)):
        image, patches = (view.to(dtype).float().requires_grad_() for view in difficult_views(kind, rows, 6))
        index = torch.arange(rows)
        loss = pirl_loss(image, patches, index, bank, temperature=0.05, form=form)
        assert loss.isfinite() and loss.dtype == torch.float32, kind
        for gradient in torch.autograd.grad(loss, (image, patches)):
            assert gradient.isfinite().all(), kind
            assert kind != "zero" or not gradient.any()
        halves = pirl_loss(image.to(dtype), patches.to(dtype), index, bank, temperature=0.05, form=form)
        assert halves.item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_small_temperature_does_not_overflow():
    image, patches, index, bank, negatives = _inputs()
    for form in FORMS:
        options = {"negatives": negatives, "form": form, "temperature": 1e-3}
        assert pirl_loss(image.float(), patches.float(), index, bank, **options).isfinite()


def test_a_batch_of_equal_images_in_a_bank_of_two():
    """The least bank: one negative."""
    z = torch.eye(2)[:1]
    bank = IndexedBank(2, 2)
    bank.rows.copy_(torch.eye(2))
    assert pirl_loss(z, z, torch.tensor([0]), bank, temperature=1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"z_patches": torch.ones(5, 3)}, "z_patches must have the shape of z_image, (5, 4), got (5, 3)"),
        ({"index": torch.arange(4)}, "positions in the training set, got torch.int64 of shape (4,)"),
        (
            {"index": None},
            "index must be int64 [B] with B = 5 rows, positions in the training set, got None",
        ),
        ({"index": torch.arange(5.0)}, "int64"),
        ({"negatives": torch.ones(4, 3, dtype=torch.int64)}, "negatives must be [B, K] or [2, B, K] with B = 5 rows"),
        ({"negatives": torch.ones(3, 5, 3, dtype=torch.int64)}, "got shape (3, 5, 3)"),
        ({"negatives": torch.ones(5, 0, dtype=torch.int64)}, "got shape (5, 0)"),
        ({"form": "softmax"}, "form must be one of info_nce, nce, nce_paper, got 'softmax'"),
        ({"sampling": "none"}, "sampling must be one of offset, vissl"),
        ({"temperature": 0.0}, "temperature must be in [1e-06, inf)"),
        ({"patch_weight": 1.5}, "patch_weight must be in [0, 1]"),
        ({"num_negatives": 0}, "num_negatives must be in [1, inf)"),
        ({"bank": IndexedBank(1, 4)}, "PIRL needs a memory bank of at least 2 images, got 1"),
        ({"bank": IndexedBank(None, 4)}, "got 0; call its allocate"),
    ],
)
def test_mistakes_are_sentences(change, sentence):
    image, patches, index, bank, _ = _inputs()
    given = {"z_image": image, "z_patches": patches, "index": index, "bank": bank, **change}
    with pytest.raises(ValueError) as error:
        pirl_loss(**given)
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["z_image", "z_patches"])
def test_an_output_that_is_not_finite_is_named_and_leaves_the_memory(name):
    image, patches, index, bank, _ = _inputs()
    given = {"z_image": image, "z_patches": patches}
    given[name][2, 1] = torch.nan
    loss, before = PIRLLoss(bank, form="nce"), bank.rows.clone()
    with pytest.raises(NotFiniteError, match=f"PIRL needs finite numbers, got NaN or inf in {name}; lower "):
        loss(**given, index=index)
    assert torch.equal(bank.rows, before) and loss.log_normalizer.isnan()
