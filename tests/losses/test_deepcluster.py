"""DeepCluster: known values, slow reference, the published sampler, processes; the method: clusters, top layer."""

import math

import pytest
import torch

from plugins.distributed import LOCAL
from plugins.draws import draw_seed
from plugins.losses import DeepClusterLoss, cluster_weights, deepcluster_loss, deepcluster_terms
from plugins.methods import METHODS
from plugins.objective import Objective
from plugins.spec import Embeddings
from plugins.targets import kmeans, whitened
from plugins.testing import DIFFICULT, assert_joined, difficult_views, toy_views


def _reference_deepcluster(logits, labels, weights):
    total = 0.0
    for scores, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total += weights[label] * (math.log(sum(math.exp(s) for s in scores)) - scores[label])
    return total / len(labels)


LABELS = torch.tensor([0, 2, 2, 1, 2, 0, 2])


def test_known_values():
    terms = deepcluster_terms(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
    assert terms.loss.item() == pytest.approx(4.5 + math.log1p(math.exp(-9))) and terms.agreement.item() == 0.5
    assert deepcluster_loss(torch.zeros(7, 5), LABELS).item() == pytest.approx(math.log(5))
    left_out = torch.full((2,), -100)
    logits = torch.ones(2, 3, requires_grad=True)
    loss = deepcluster_loss(logits, left_out)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_equals_the_slow_reference_and_its_gradient():
    logits, weights = toy_views(7, 3)[0], torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
    expected = _reference_deepcluster(logits, LABELS, weights.tolist())
    assert DeepClusterLoss()(logits, LABELS, weights).item() == pytest.approx(expected, rel=1e-10)
    assert deepcluster_loss(logits.float(), LABELS, weights=weights).item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.gradcheck(lambda z: deepcluster_loss(z, LABELS, weights=weights), logits.requires_grad_())


def test_weights_are_the_expectation_of_the_published_sampler():
    """n / k' + 1 draws of each of the k' clusters with images, with replacement, shuffled, the first n."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.zeros(50), torch.ones(7), torch.full((23,), 3)]).long()  # cluster 2 is empty
    losses = torch.rand(80, generator=generator, dtype=torch.float64) + labels
    weights = cluster_weights(labels, 4)
    assert weights[labels].sum().item() == pytest.approx(80) and weights[2] == 0
    found = []
    for _ in range(800):
        drawn = []
        for cluster in (0, 1, 3):
            members = (labels == cluster).nonzero().flatten()
            drawn.append(members[torch.randint(len(members), (80 // 3 + 1,), generator=generator)])
        order = torch.cat(drawn)
        found.append(losses[order[torch.randperm(len(order), generator=generator)[:80]]].mean())
    found = torch.stack(found)
    error = found.std().item() / 800**0.5
    assert (weights[labels] * losses).mean().item() == pytest.approx(found.mean().item(), abs=4 * error)
    assert losses.mean().item() != pytest.approx(found.mean().item(), abs=20 * error)


def _step(comm, model, x, labels):
    weights = torch.tensor([0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    return deepcluster_loss(model(x), labels[:, 0].long(), weights=weights, comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 3), (2, 5, 1), (0, 1, 7)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    labels = torch.tensor([0.0, 3, 1, -100, 2, 2, 0, -100])[:, None]
    assert_joined(ranks, _step, [toy_views(8, 5)[0], labels], counts)


@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_logits_are_finite(kind):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = difficult_views(kind, 7, 3)[0].to(dtype).float().requires_grad_()
        loss = deepcluster_loss(logits, LABELS, weights=cluster_weights(LABELS, 3))
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
        halves = deepcluster_loss(logits.to(dtype), LABELS, weights=cluster_weights(LABELS, 3))
        assert halves.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "weights"),
    [
        (torch.zeros(7), LABELS, None),
        (torch.zeros(6, 3), LABELS, None),
        (torch.zeros(7, 3), LABELS.float(), None),
        (torch.zeros(7, 3), LABELS, torch.ones(4)),
    ],
)
def test_mistakes_are_sentences(logits, labels, weights):
    with pytest.raises(ValueError, match="must be"):
        deepcluster_loss(logits, labels, weights=weights)


# --- the method ------------------------------------------------------------------------------------------------------


def _method(**options):
    torch.manual_seed(0)
    spec = METHODS["deepcluster"]
    options = spec.resolve({"num_clusters": 5, "pca_dim": 3, **options})
    head = spec.head(6, options)
    objective = Objective(spec, options, LOCAL, projector=head)
    objective.allocate(40)
    return head, objective


def _images():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) + 3 * (torch.arange(40)[:, None] % 3)


def _feed(*, view="eval", mode="eval"):
    assert (view, mode) == ("eval", "eval")
    for index in torch.arange(40).split(16):
        yield index, [_images()[index]]


def test_an_epoch_clusters_whitened_features_and_starts_the_top_layer_anew():
    head, objective = _method()
    before = head.weight.clone()
    fresh = objective.start_epoch(3, _feed)
    assert len(fresh) == 2 and fresh[0] is head.weight and fresh[1] is head.bias
    assert not torch.equal(head.weight, before) and head.weight.abs().max() < 0.05 and not head.bias.any()
    expected = kmeans(whitened(_images(), 3), 5, seed=draw_seed(0, 3), index=torch.arange(40)).labels
    assert torch.equal(objective.criterion.table.labels[0].long(), expected)
    torch.testing.assert_close(objective.criterion.weights, cluster_weights(expected, 5))
    once = head.weight.clone(), objective.criterion.table.labels.clone()
    assert objective.start_epoch(3, _feed) == [], "the epoch has begun"
    objective.start_epoch(4, _feed)
    assert not torch.equal(head.weight, once[0]) and not torch.equal(objective.criterion.table.labels, once[1])


def test_the_loss_weights_images_unless_the_option_says_none():
    index, logits = torch.arange(40), torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    values = {}
    for balance in ("weight", "none"):
        _, objective = _method(balance=balance)
        objective.start_epoch(0, _feed)
        (labels,) = objective.criterion.table.read(index)
        weights = cluster_weights(labels, 5) if balance == "weight" else None
        values[balance] = objective(Embeddings([logits], [logits], [logits], index=index)).loss
        torch.testing.assert_close(values[balance], deepcluster_loss(logits, labels, weights=weights))
    assert values["weight"] != values["none"]


def test_the_top_layer_has_no_momentum_and_too_many_clusters_are_a_sentence():
    _, objective = _method()
    (group,) = objective.groups
    assert group.name == "projector" and group.hints.momentum == 0.0
    with pytest.raises(ValueError, match="num_clusters must be at most the number of training images, 40, got 41"):
        _method(num_clusters=41)
