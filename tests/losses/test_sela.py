"""SeLa: known values, slow reference, gradient, processes; the method: schedule, labels, resume, one view."""

import copy
import math

import pytest
import torch
from torch import nn

from plugins.distributed import LOCAL
from plugins.experiments.bench import LiveBytes
from plugins.losses import SeLaLoss, sela_loss, sela_terms
from plugins.methods import METHODS
from plugins.methods.sela import updates_labels
from plugins.objective import Objective, embed
from plugins.targets import balanced_labels
from plugins.testing import DIFFICULT, assert_joined, difficult_views, toy_views
from plugins.tools.feed import shares


def _reference_sela(logits, labels):
    heads, total = len(labels), 0.0
    for row, of_row in zip(logits.unflatten(1, (heads, -1)), labels.T, strict=True):
        for scores, label in zip(row.tolist(), of_row.tolist(), strict=True):
            total += math.log(sum(math.exp(s) for s in scores)) - scores[label]
    return total / labels.numel()


def _labels(heads, rows, classes, seed=0):
    return torch.randint(classes, (heads, rows), generator=torch.Generator().manual_seed(seed))


def test_known_values():
    labels = torch.tensor([[0, 1], [1, 1]])
    assert sela_loss(torch.zeros(2, 2 * 7), labels).item() == pytest.approx(math.log(7))
    sure = torch.tensor([[50.0, 0, 0, 50], [0, 50, 50, 0]])  # the second head is wrong in the second row
    terms = sela_terms(sure, labels)
    assert terms.loss.item() == pytest.approx(50 / 4) and terms.agreement.item() == 0.75
    assert sela_loss(sure, torch.tensor([[0, -100], [1, -100]])).item() == pytest.approx(0, abs=1e-6)


def test_equals_the_slow_reference_and_its_gradient():
    logits, labels = toy_views(7, 12)[0], _labels(3, 7, 4)
    expected = _reference_sela(logits, labels)
    assert SeLaLoss()(logits, labels).item() == pytest.approx(expected, rel=1e-10)
    assert sela_loss(logits.float(), labels).item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.gradcheck(lambda z: sela_loss(z, labels), logits.requires_grad_())


def _step(comm, model, x, labels):
    return sela_loss(model(x), labels.long().T, comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(6, 3), (2, 6, 1), (4, 0, 5)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    labels = _labels(2, 9, 2).T.double()
    labels[4] = -100
    assert_joined(ranks, _step, [toy_views(9, 5)[0], labels], counts)


@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_logits_are_finite(kind):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = difficult_views(kind, 4, 6)[0].to(dtype).float().requires_grad_()
        loss = sela_loss(logits, _labels(2, 4, 3))
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
        assert sela_loss(logits.to(dtype), _labels(2, 4, 3)).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3, 5), _labels(2, 3, 2)),
        (torch.zeros(3, 4), _labels(2, 2, 2)),
        (torch.zeros(3, 4), _labels(1, 3, 2).float()),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 4, 1), _labels(1, 3, 2)),
    ],
)
def test_mistakes_are_sentences(logits, labels):
    with pytest.raises(ValueError, match="must be"):
        sela_loss(logits, labels)


# --- the method ------------------------------------------------------------------------------------------------------

SIZE = 30


class Run:
    """The network, the head and the objective, with a feed of fixed images. It counts what a pass reads."""

    def __init__(self, method, comm=LOCAL, seed=0, norm=True, **options):
        torch.manual_seed(seed)
        spec = METHODS[method]
        self.options = spec.resolve(options)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
        self.head = spec.head(8, self.options).double()
        if not norm:  # batch norm has the statistics of each process
            self.head = nn.Sequential(*(part for part in self.head if not isinstance(part, nn.BatchNorm1d)))
        self.objective = Objective(spec, self.options, comm, projector=self.head)
        self.objective.allocate(SIZE)
        generator = torch.Generator().manual_seed(9)
        image, noise = (torch.randn(n, SIZE, 6, generator=generator, dtype=torch.float64) for n in (1, 3))
        self.images = image + 0.3 * noise  # as evaluated, and two views
        self.comm, self.views, self.passes, self.fresh = comm, spec.views or 2, [], []
        hints = {group.name: group.hints.group_options() for group in self.objective.groups}
        groups = [{"params": [*self.network.parameters()]}, {"params": [*self.head.parameters()]}]
        groups[1].update(hints.get("projector", {}))
        self.optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9)

    def feed(self, *, view="eval", mode="eval"):
        self.passes.append((view, mode, []))
        for batch in shares(SIZE, 4, self.comm.rank, self.comm.size):
            self.passes[-1][2].extend(batch)
            index = torch.tensor(batch)
            sources = self.images[:1] if view == "eval" else self.images[1:]
            yield index, [self.network(images[index]).detach() for images in sources]

    def epoch(self, epoch, batches, feed=True):
        self.fresh = self.objective.start_epoch(epoch, self.feed if feed else None)
        for parameter in self.fresh:
            self.optimizer.state.pop(parameter, None)
        return [self.step(index) for index in batches]

    def step(self, index):
        self.objective.before_step()
        features = [self.network(images[index]) for images in self.images[1 : 1 + self.views]]
        terms = self.objective(embed(features, self.head, large=self.views, index=index))
        self.optimizer.zero_grad()
        terms.loss.backward()
        for parameter in self.parameters():
            if self.comm.size > 1:
                parameter.grad = self.comm.sum(parameter.grad) / self.comm.size
        self.optimizer.step()
        self.objective.after_step()
        return terms

    def parameters(self):
        return [*self.network.parameters(), *self.head.parameters()]

    def state(self):
        parts = [self.network, self.head, self.objective, self.optimizer]
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, state):
        for part, saved in zip([self.network, self.head, self.objective, self.optimizer], state, strict=True):
            part.load_state_dict(copy.deepcopy(saved))
        return self


SELA = {"n_clusters": 3, "n_heads": 2, "lamb": 5.0, "tol": 1e-3}
BATCHES = [torch.arange(start, start + 10) for start in (0, 10, 20)]


@pytest.mark.slow
def test_labels_are_those_of_all_images_as_evaluated():
    run = Run("sela", **SELA)
    before = run.objective.criterion.table.labels.clone()
    with torch.no_grad():
        logits = run.head(run.network(run.images[0])).unflatten(1, (2, 3))
    run.epoch(0, [])
    ((view, mode, seen),) = run.passes
    assert (view, mode) == ("eval", "eval") and seen == [*range(SIZE)]
    for head, labels in enumerate(run.objective.criterion.table.labels):
        expected = balanced_labels(logits[:, head].log_softmax(1), lamb=5.0, tol=1e-3)
        assert labels.tolist() == expected.tolist() and not torch.equal(labels, before[head])
        assert labels.bincount(minlength=3).min() >= 8
    agreement = [terms.agreement.item() for epoch in range(20) for terms in run.epoch(epoch, BATCHES)]
    assert agreement[-1] > 0.8 > agreement[0]


@pytest.mark.parametrize("options", [{"label_view": "train", "label_mode": "train"}, {"half_features": True}])
def test_views_modes_and_precision_of_the_labels(options):
    run, other = Run("sela", **SELA, **options), Run("sela", **SELA)
    for each in (run, other):
        each.epoch(0, [])
    assert run.passes[0][:2] == (options.get("label_view", "eval"), options.get("label_mode", "eval"))
    same = torch.equal(run.objective.criterion.table.labels, other.objective.criterion.table.labels)
    assert same == ("half_features" in options)


def test_a_head_of_the_users_own_labels_as_a_linear_one():
    run, other = Run("sela", **SELA), Run("sela", **SELA)
    other.objective.criterion.attach(None, nn.Sequential(other.head))
    for each in (run, other):
        each.epoch(0, [])
    assert torch.equal(run.objective.criterion.table.labels, other.objective.criterion.table.labels)


def test_a_head_of_another_width_is_a_sentence():
    run = Run("sela", **SELA)
    run.head = nn.Linear(8, 7).double()
    with pytest.raises(ValueError, match="2 heads of 3 classes need 6 outputs, got 7; change n_heads, n_clusters"):
        run.step(torch.arange(4))


def test_the_published_schedules():
    square = [epoch for epoch in range(401) if updates_labels(epoch, 100, 400, "square")]
    assert len(square) == 93 and sum(epoch <= 40 for epoch in square) > 20
    linear = [epoch for epoch in range(401) if updates_labels(epoch, 400, 400, "linear")]
    assert len(linear) == 399 and (linear[1], linear[-1]) == (2, 400)
    assert [epoch for epoch in range(5) if updates_labels(epoch, 1, 5, "linear")] == [0]


def test_updates_follow_the_schedule_and_rotate():
    run = Run("sela", **SELA, label_updates=3)
    with pytest.raises(ValueError, match=r"label_updates=3 needs the number of epochs .*; set it to 0"):
        run.epoch(0, [])
    run.objective.clock.total, run.objective.clock.steps_per_epoch = 12, 3
    made = []
    for epoch in range(4):
        run.epoch(epoch, BATCHES)
        made.append(int(run.objective.criterion.table.epoch))
    assert made == [0, 0, 0, 3] and len(run.passes) == 2
    rotating = Run("sela", **SELA, rotate_heads=True)
    before = rotating.objective.criterion.table.labels.clone()
    rotating.epoch(1, [])
    changed = (rotating.objective.criterion.table.labels != before).any(1)
    assert changed.tolist() == [False, True]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sela", SELA),
        ("deepcluster", {"num_clusters": 4, "pca_dim": 3}),
        ("deepcluster_v2", {"num_prototypes": 4, "proj_hidden_dim": 8, "proj_output_dim": 4}),
    ],
)
@pytest.mark.parametrize("stop", [0, 2])
def test_a_run_resumes_at_and_within_an_epoch_to_the_same_bits(method, options, stop):
    whole = Run(method, **options)
    for epoch in range(2):
        whole.epoch(epoch, BATCHES)
    at = whole.state()
    if stop:
        whole.epoch(2, BATCHES[:stop])
        at = whole.state()
        for index in BATCHES[stop:]:
            whole.step(index)
    else:
        whole.epoch(2, BATCHES)
    whole.epoch(3, BATCHES)
    resumed = Run(method, seed=5, **options).load(at)
    resumed.epoch(2, BATCHES[stop:])
    resumed.epoch(3, BATCHES)
    assert len(resumed.passes) == (0 if method == "deepcluster_v2" else 1 if stop else 2)
    for ours, theirs in zip(resumed.state()[:3], whole.state()[:3], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name


def _trained(comm, method, options, counts):
    run = Run(method, comm, norm=method != "deepcluster_v2", **options)
    for epoch in range(2):
        run.epoch(epoch, [index.split(counts)[comm.rank] for index in BATCHES])
    seen = [seen for _, _, seen in run.passes]
    return {**run.network.state_dict(), **run.head.state_dict(), **run.objective.state_dict()}, seen


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sela", SELA),
        ("deepcluster", {"num_clusters": 4, "pca_dim": 3}),
        ("deepcluster_v2", {"num_prototypes": 4, "proj_hidden_dim": 8, "proj_output_dim": 4}),
    ],
)
@pytest.mark.parametrize("counts", [(6, 4), (5, 4, 1)])
def test_processes_train_as_one(ranks, method, options, counts):
    expected, (first, *_) = _trained(LOCAL, method, options, [10])
    results = ranks.run(_trained, [(method, options, list(counts))] * len(counts))
    for state, _ in results:
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    read = [seen[0] for _, seen in results]
    assert sorted(image for of_rank in read for image in of_rank) == [*range(SIZE)] == sorted(first)


def _peak(method, images, **options):
    """Bytes that are alive at once while the labels are made, beside the networks."""
    spec = METHODS[method]
    options = spec.resolve(options)
    objective = Objective(spec, options, LOCAL, projector=spec.head(64, options))
    objective.allocate(images)

    def feed(*, view, mode):
        for index in torch.arange(images).split(500):
            yield index, [torch.randn(len(index), 64)]

    with LiveBytes() as live:
        objective.start_epoch(0, feed)
    return live.peak


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("method", "options", "numbers"),
    [("sela", {"n_clusters": 50, "n_heads": 2, "max_iter": 3}, 2 * 50), ("deepcluster", {"num_clusters": 9}, 64)],
)
def test_the_memory_for_labels_is_that_of_the_documentation(method, options, numbers, half):
    """The features once, and the matrix of a head twice or the components; a few numbers for each image."""
    few, many = (_peak(method, images, half_features=half, **options) for images in (20_000, 40_000))
    stated = 64 * (2 if half else 4) + 4 * numbers
    assert stated - 16 <= (many - few) / 20_000 <= stated + 64


@pytest.mark.parametrize("method", ["sela", "deepcluster", "deepcluster_v2"])
def test_without_a_pass_it_says_so(method):
    small = {"n_clusters": 3, "num_clusters": 3, "num_prototypes": 3, "proj_hidden_dim": 8, "proj_output_dim": 4}
    run = Run(method, **{key: value for key, value in small.items() if key in METHODS[method].options})
    with pytest.warns(UserWarning, match=r"has not seen it: it trains on .* call start_epoch\(epoch, dataloader"):
        run.epoch(0, [], feed=False)


def test_one_view_is_enough():
    for method in ("sela", "deepcluster"):
        METHODS[method].check_views(1)
        with pytest.raises(ValueError, match="needs 1 large view, got 2 large views"):
            METHODS[method].check_views(2)
