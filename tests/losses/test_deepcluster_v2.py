"""DeepCluster v2: known values, slow reference, images without label, processes; the method: banks, clusterings."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from plugins.distributed import LOCAL
from plugins.draws import draw_seed
from plugins.losses import DeepClusterV2Loss, deepcluster_v2_loss, deepcluster_v2_terms
from plugins.methods import METHODS
from plugins.objective import Objective, embed
from plugins.targets import kmeans
from plugins.targets.label_table import IGNORED
from plugins.testing import DIFFICULT, assert_joined, difficult_views, toy_views

LABELS = torch.tensor([[0, 2, -100, 1, 2], [1, -100, -100, 0, 0]])


def _prototypes(width=4):
    generator = torch.Generator().manual_seed(3)
    return [F.normalize(torch.randn(k, width, generator=generator, dtype=torch.float64), dim=1) for k in (3, 2)]


def _reference_v2(views, labels, prototypes, tau=0.1):
    """Compute the loss as published: cross-entropy of all crops per head, mean over labelled rows, mean over heads."""
    total = 0.0
    for of_rows, centroids in zip(labels, prototypes, strict=True):
        losses = []
        for view in views:
            for row, label in zip(view, of_rows.tolist(), strict=True):
                if label != -100:
                    scores = ((row / row.norm()) @ centroids.T / tau).tolist()
                    losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[label])
        total += sum(losses) / len(losses)
    return total / len(prototypes)


def test_known_values():
    eye = torch.eye(3, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2]])
    terms = deepcluster_v2_terms([eye, 7 * eye], labels, [eye], temperature=0.5)
    assert terms.loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert terms.agreement.item() == 1 and terms.labelled.item() == 1
    assert deepcluster_v2_loss([0 * eye], labels, [eye]).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_equals_the_slow_reference_and_its_gradient(views, tau):
    z, prototypes = toy_views(5, 4, views=views), _prototypes()
    expected = _reference_v2(z, LABELS, prototypes, tau)
    assert DeepClusterV2Loss(temperature=tau)(z, LABELS, prototypes).item() == pytest.approx(expected, rel=1e-10)
    halves = deepcluster_v2_loss([view.float() for view in z], LABELS, prototypes, temperature=tau)
    assert halves.item() == pytest.approx(expected, rel=1e-5)
    free = [view.requires_grad_() for view in z]
    assert torch.autograd.gradcheck(lambda *z: deepcluster_v2_loss(z, LABELS, prototypes, temperature=tau), free)
    gradient = torch.autograd.grad(deepcluster_v2_loss(z, LABELS, prototypes, temperature=tau), free)
    assert all((g * view).sum(1).abs().max() < 1e-12 for g, view in zip(gradient, z, strict=True))
    assert all(not g[2].any() for g in gradient), "an image without a label"


@pytest.mark.solo
def test_loss_and_clusters_are_those_of_solo_learn():
    """solo-learn's code equals that of the authors, except in the first epoch."""
    import_module("solo_ext.registry")  # patches solo-learn, before it is imported
    loss = import_module("solo.losses.deepclusterv2").deepclusterv2_loss_func
    clustering = import_module("solo.utils.kmeans").KMeans

    views = [F.normalize(view.float(), dim=1) for view in toy_views(30, 4)]
    theirs = clustering(1, 0, 2, 30, 4, [5, 3], kmeans_iters=4)
    torch.manual_seed(7)
    assignments, centroids = theirs.cluster_memory(torch.arange(30), torch.stack(views))
    torch.manual_seed(7)
    for number, count in enumerate((5, 3)):
        init = views[number][torch.randperm(30)[:count]]
        ours = kmeans(views[number], count, iterations=4, spherical=True, init=init)
        assert torch.equal(ours.labels, assignments[number])
        torch.testing.assert_close(ours.centroids, centroids[number])
    same = [centroids[0], centroids[0].flip(0)]
    labels = torch.stack([assignments[0], 4 - assignments[0]])
    outputs = torch.stack([torch.stack([view @ rows.T for view in views]) for rows in same])
    expected = loss(outputs, labels, 0.1)
    torch.testing.assert_close(deepcluster_v2_loss(views, labels, same), expected)


def test_a_batch_without_labels_has_the_loss_and_the_gradient_zero():
    z = torch.randn(3, 4, requires_grad=True)
    terms = deepcluster_v2_terms([z, z], torch.full((2, 3), IGNORED), _prototypes())
    terms.loss.backward()
    assert terms.loss.item() == 0 and not z.grad.any() and terms.labelled.item() == 0


def _step(comm, model, x0, x1, labels):
    return deepcluster_v2_loss([model(x0), model(x1)], labels.long().T, _prototypes(), comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(3, 2), (1, 3, 1), (0, 4, 1)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    assert_joined(ranks, _step, [*toy_views(5, 5), LABELS.T.double()], counts)


@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_views_are_finite(kind):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        z = [view.to(dtype).float().requires_grad_() for view in difficult_views(kind, 5, 4)]
        loss = deepcluster_v2_loss(z, LABELS, _prototypes())
        assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, z))
        halves = deepcluster_v2_loss([view.to(dtype) for view in z], LABELS, _prototypes())
        assert halves.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("z", "labels", "prototypes"),
    [
        ([], LABELS, _prototypes()),
        (torch.zeros(5, 4), LABELS, _prototypes()),
        ([torch.zeros(4, 4)], LABELS, _prototypes()),
        ([torch.zeros(5, 4)], LABELS[:1], _prototypes()),
        ([torch.zeros(5, 4)], LABELS.float(), _prototypes()),
        ([torch.zeros(5, 3)], LABELS, _prototypes()),
        ([torch.zeros(5, 4)], LABELS[:0], []),
    ],
)
def test_mistakes_are_sentences(z, labels, prototypes):
    with pytest.raises(ValueError, match=r"must|needs|pass a list"):
        deepcluster_v2_loss(z, labels, prototypes)


# --- the method ------------------------------------------------------------------------------------------------------

SIZE = 24


def _method(**options):
    torch.manual_seed(0)
    spec = METHODS["deepcluster_v2"]
    small = {"proj_hidden_dim": 8, "proj_output_dim": 4, "num_prototypes": 5, "kmeans_iterations": 3}
    options = spec.resolve({**small, **options})
    head = spec.head(6, options)
    objective = Objective(spec, options, LOCAL, projector=head)
    objective.allocate(SIZE)
    return head, objective


def _views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, 6, generator=generator) for _ in range(3)]


def _feed(*, view="eval", mode="eval"):
    assert (view, mode) == ("train", "train")
    for index in torch.arange(SIZE).split(8):
        yield index, [views[index] for views in _views()]


def test_the_pass_before_the_first_epoch_fills_the_banks_and_the_clusterings():
    head, objective = _method()
    head.eval()
    objective.start_epoch(0, _feed)
    criterion = objective.criterion
    assert not head.training and not any(part.training for part in head)
    assert (criterion.stamps == -1).all() and criterion.table.labels.min() >= 0
    head.train()
    for bank, view in zip(criterion.banks, _views(), strict=False):
        expected = torch.cat([head(rows) for rows in view.split(8)])
        torch.testing.assert_close(bank.rows, expected.detach())
    for number in range(3):
        rows = criterion.banks[number % 2].rows
        found = kmeans(rows, 5, iterations=3, spherical=True, seed=draw_seed(0, 0, number))
        torch.testing.assert_close(criterion.prototypes[number], found.centroids)
        assert torch.equal(criterion.table.labels[number].long(), found.labels)


def _step_of(head, objective, index):
    terms = objective(embed([view[index] for view in _views()[:2]], head, index=index))
    terms.loss.backward()
    return terms


def test_only_images_of_the_previous_epoch_have_labels():
    head, objective = _method()
    objective.start_epoch(0, _feed)
    index = torch.tensor([1, 2, 3, 5, 8, 13, 21])
    assert _step_of(head, objective, index).labelled.item() == 1
    objective.start_epoch(1, _feed)
    labels = objective.criterion.table.labels
    assert ((labels >= 0).any(0)).nonzero().flatten().tolist() == index.tolist()
    stored = [bank.rows[index] for bank in objective.criterion.banks]
    head.train()
    for rows, view in zip(stored, _views(), strict=False):
        torch.testing.assert_close(rows, head(view[index]).detach())
    assert _step_of(head, objective, torch.tensor([0, 4])).loss.item() == 0


def test_without_a_pass_the_first_epoch_has_the_loss_zero_and_the_second_has_labels():
    head, objective = _method()
    with pytest.warns(UserWarning, match="no labels in this epoch, with the loss 0"):
        objective.start_epoch(0)
    for index in torch.arange(SIZE).split(8):
        assert _step_of(head, objective, index).loss.item() == 0
    objective.start_epoch(1)
    terms = _step_of(head, objective, torch.arange(8))
    assert terms.loss > 0 and terms.labelled.item() == 1


def test_an_epoch_that_has_seen_too_few_images_is_a_warning_and_too_many_prototypes_an_error():
    head, objective = _method()
    objective.start_epoch(0, _feed)
    _step_of(head, objective, torch.arange(4))
    with pytest.warns(UserWarning, match="has seen 4 images in the previous epoch, too few for 5 prototypes"):
        objective.start_epoch(1, _feed)
    assert _step_of(head, objective, torch.arange(4)).loss.item() == 0
    with pytest.raises(ValueError, match="num_prototypes must be at most the number of training images, 24, got 25"):
        _method(num_prototypes=25)


def test_evaluation_writes_nothing():
    head, objective = _method()
    objective.start_epoch(0, _feed)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()
    _step_of(head, objective, torch.arange(4))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
