"""The use of a MethodSpec in every adapter: embeddings, views, statistics."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from plugins.distributed import LOCAL
from plugins.heads import Heads, MapHead, SharedHead, TwoBranchHead
from plugins.losses import cissl_loss
from plugins.methods import METHODS
from plugins.objective import Objective, connect, embed, encode_views
from plugins.spec import Embeddings, large_views


def test_each_view_has_its_own_batch_statistics():
    projector = nn.BatchNorm1d(3, affine=False)
    features = [torch.randn(8, 3) * scale + shift for scale, shift in ((1.0, 0.0), (5.0, 2.0))]
    e = embed(features, projector)
    for view in e.z:
        torch.testing.assert_close(view.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(view.var(0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    assert all(p is z for p, z in zip(e.p, e.z, strict=True)), "no predictor: p = z"


def test_the_views_of_a_shared_head_have_common_batch_statistics():
    head = SharedHead(nn.BatchNorm1d(3, affine=False, momentum=1.0))
    features = [torch.randn(8, 3) * scale + shift for scale, shift in ((1.0, 0.0), (5.0, 2.0))]
    e = embed(features, head)
    joined = torch.cat(features)
    expected = (joined - joined.mean(0)) / joined.var(0, unbiased=False).add(1e-5).sqrt()
    torch.testing.assert_close(torch.cat(e.z), expected)
    torch.testing.assert_close(head[0].running_mean, joined.mean(0))
    assert head[0].num_batches_tracked == 1, "one pass serves both sides"


def test_simclr_is_cissl_with_one_head_and_without_the_own_view():
    """The expected loss is computed from the features: one head, cosines, softmax over the 2B - 1 other rows."""
    spec = METHODS["cissl"]
    options = spec.resolve({"heads": "simclr", "positives": "other", "proj_output_dim": 6, "temperature": 0.2})
    torch.manual_seed(0)
    head = spec.head(5, options).double()
    assert [key for key in head.state_dict() if key.endswith("weight")] == [
        "0.weight",
        "1.weight",
        "3.weight",
        "4.weight",
    ]
    features = [torch.randn(4, 5, dtype=torch.float64) for _ in range(2)]
    loss = spec.loss(options, LOCAL)(embed(features, head)).loss
    u = torch.nn.functional.normalize(head(torch.cat(features)), dim=1)
    expected = 0.0
    for k in range(8):
        others = [j for j in range(8) if j != k]
        scores = torch.stack([u[k] @ u[j] / 0.2 for j in others])
        expected = expected - scores.log_softmax(0)[others.index((k + 4) % 8)] / 8
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(head.parameters())
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for one, other in gradients:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_small_crops_of_one_head_are_on_both_sides():
    spec = METHODS["cissl"]
    options = spec.resolve({"heads": "simclr", "positives": "other", "proj_output_dim": 6})
    e = embed([torch.randn(4, 5) for _ in range(3)], spec.head(5, options), large=2)
    expected = cissl_loss(e.z, e.z, positives="other")
    torch.testing.assert_close(spec.loss(options, LOCAL)(e).loss, expected)


def test_targets_are_detached_projections_of_the_large_views():
    projector = nn.Linear(3, 2)
    features = [torch.randn(4, 3) for _ in range(5)]
    e = embed(features, projector, large=2)
    assert (len(e.z), len(e.target)) == (5, 2)
    for target, z in zip(e.target, e.z[:2], strict=True):
        assert torch.equal(target, z) and not target.requires_grad and z.requires_grad


def test_a_second_branch_makes_targets_with_gradient():
    head = TwoBranchHead(Heads(teacher=nn.Linear(3, 2), student=nn.Linear(3, 2)), 3)
    features = [torch.randn(4, 3) for _ in range(3)]
    e = embed(features, head, large=2)
    assert torch.equal(e.target[1], head.teacher(features[1])) and torch.equal(e.z[2], head.student(features[2]))
    assert (len(e.z), len(e.target), len(e.features)) == (3, 2, 2), "the small crop is the student's alone"
    sum(target.sum() for target in e.target).backward()
    assert head.teacher.weight.grad is not None and head.student.weight.grad is None


class _Maps(MapHead):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, features):
        return self.layer(features)

    def build(self, channels):
        self.channels = channels

    def project_maps(self, maps):
        return tuple(2 * map_ for map_ in maps)


def test_the_head_gets_the_maps_of_each_view():
    head, backbone = _Maps(), nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 3, 1))
    connect(head, backbone, {"1": 2})
    assert head.channels == [5]
    views = [torch.randn(4, 3, side, side) for side in (8, 8, 6)]
    features, maps = encode_views(backbone, views, {"1": 2})
    e = embed(features, head, maps=maps)
    for view, (found,) in zip(views, e.maps, strict=True):
        torch.testing.assert_close(found, 2 * nn.functional.adaptive_avg_pool2d(backbone[:2](view), 2))
    assert embed(features, head).maps == [] and embed(features, nn.Linear(3, 2), maps=maps).maps == []
    features, maps = encode_views(backbone, views, {})
    assert embed(features, head, maps=maps).maps == []
    with pytest.raises(ValueError, match="the head must be a MapHead, got a Linear"):
        connect(nn.Linear(3, 2), backbone, {"1": 2})


def test_a_map_that_is_not_finite_is_named():
    spec = METHODS["simsiam"]
    objective, z = Objective(spec, spec.resolve({})), [torch.eye(2) * math.nan] * 2
    with pytest.raises(ValueError, match=r"z of view 0, .*map 1 of view 0"):
        objective(Embeddings(z, z, z, maps=[(torch.ones(2, 1), torch.ones(2, 1) / 0)]))


def test_a_given_target_and_predictor_are_taken():
    target = [torch.zeros(4, 2)] * 2
    e = embed([torch.ones(4, 3)] * 2, nn.Linear(3, 2), lambda z: [2 * view for view in z], target)
    assert e.target is target
    torch.testing.assert_close(e.p[1], 2 * e.z[1])


@pytest.mark.parametrize(
    ("large", "small", "got"),
    [(1, 0, "1 large view"), (3, 0, "3 large views"), (2, 1, "2 large views and 1 small crop")],
)
def test_a_two_view_method_refuses_other_views(large, small, got):
    spec = replace(METHODS["isoloss"], views=2)
    spec.check_views(2)
    with pytest.raises(ValueError, match=f"^method isoloss needs 2 large views of one size, got {got}$"):
        spec.check_views(large, small)


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.views is None])
def test_methods_without_a_number_of_views_take_more_than_two(method):
    """Each other view predicts each large view's target: one term for each pair that the formula names."""
    spec = METHODS[method]
    for large, small in ((2, 0), (3, 0), (2, 6)):
        spec.check_views(large, small)
    with pytest.raises(ValueError, match=f"^method {method} needs at least two views, got 1$"):
        spec.check_views(1, 0)


@pytest.mark.parametrize(
    ("sizes", "large"), [([8], 1), ([8, 8], 2), ([8, 8, 4, 6, 4], 2), ([(8, 6), (8, 6), (6, 6), (4, 4)], 2)]
)
def test_large_views_are_those_of_the_first_size_that_come_first(sizes, large):
    assert large_views(sizes) == large


@pytest.mark.parametrize(
    "sizes", [[4, 4, 8, 8], [8, 4, 8], [8, 4, 4, 9], [(8, 6), (6, 8)], [(8, 6), (8, 4), (8, 6)], []]
)
def test_views_in_another_order_are_refused(sizes):
    with pytest.raises(ValueError, match=r"large views come first|must have at least one entry") as error:
        large_views(sizes)
    assert str(sizes) in str(error.value) or not sizes


def test_the_least_number_of_large_views_is_the_methods():
    METHODS["isoloss"].check_views(1, 6)
    with pytest.raises(ValueError, match="cissl needs at least 2 large views, got 1 large view and 6 small crops"):
        METHODS["cissl"].check_views(1, 6)


def test_the_spectrum_is_followed_once_in_training_only():
    spec = METHODS["ssl_ey"]
    options = spec.resolve({"proj_output_dim": 2, "log_eigvals": True})
    objective = Objective(spec, options)
    z = [torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    objective.eval()(Embeddings(z, z, z))
    assert not objective.tracked_moment(None).C.any()
    objective.train()(Embeddings(z, z, z))
    # 0.01 of the first view's moment, decayed by the second's
    expected = 0.99 * 0.01 * torch.diag(torch.tensor([0.5, 4.5])) + 0.01 * torch.diag(torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(objective.tracked_moment(None).C, expected)
    assert Objective(spec, spec.resolve({})).tracked_moment(None) is None


def test_a_closed_form_predictor_follows_it_itself():
    spec = METHODS["isoloss"]
    options = spec.resolve({"proj_output_dim": 2, "log_eigvals": True})
    predictor = spec.predictor(options, LOCAL)
    objective = Objective(spec, options, LOCAL, predictor)
    assert objective.tracked_moment(predictor) is predictor
    assert not list(objective.state_dict()), "the predictor is the caller's"


def test_statistics_are_the_terms_and_the_spread():
    spec = METHODS["simsiam"]
    z = [torch.eye(2, requires_grad=True), torch.eye(2)]
    e = Embeddings(z, z, [view.detach() for view in z])
    objective = Objective(spec, spec.resolve({}))
    statistics = objective.statistics(objective(e), e)
    assert statistics["loss"] == -1 and statistics["cosine"] == 1
    # columns (1, 0) and (0, 1): standard deviation sqrt(1/2)
    assert math.isclose(statistics["z_std"], math.sqrt(0.5), rel_tol=1e-6)
    assert not any(value.requires_grad for value in statistics.values())
