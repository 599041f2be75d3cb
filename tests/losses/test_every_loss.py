"""Every loss is finite on degenerate batches, and raises an error or is not finite for input that is not finite."""

import itertools
import warnings
from functools import partial

import pytest
import torch

from plugins.checks import NotFiniteError
from plugins.distributed import LOCAL
from plugins.heads import SharedHead
from plugins.losses import (
    MatrixSSLLoss,
    MECLoss,
    barlow_twins_loss,
    byol_loss,
    cissl_loss,
    corinfomax_loss,
    cpc_loss,
    dissl_loss,
    i_vne_loss,
    isoloss,
    lejepa_loss,
    matrix_ssl_loss,
    matrix_ssl_terms,
    mec_loss,
    mec_terms,
    pirl_loss,
    rectified_lpjepa_loss,
    relic_loss,
    simclr_loss,
    simdino_loss,
    ssl_ey_loss,
    vicreg_loss,
)
from plugins.methods import METHODS
from plugins.objective import Objective, embed
from plugins.targets import IndexedBank
from plugins.testing import NARROW, devices, toy_maps, toy_stacks, view_count

pytestmark = pytest.mark.filterwarnings("ignore:the exact logarithm is another objective", "ignore:the series of")


def _pirl(z_image, z_patches, form="info_nce"):
    rows, width = z_image.shape
    device = z_image.device
    bank = IndexedBank(rows + 1, width).to(device)
    return pirl_loss(z_image, z_patches, torch.arange(rows, device=device), bank, form=form)


def _cpc(a, b):
    """A grid of 2 x 2 locations, whose upper row predicts the lower one."""
    targets = torch.stack([a, b, b, a], -1).unflatten(2, (2, 2))
    return cpc_loss({1: torch.stack([b, a], -1).unsqueeze(2)}, targets)


def _eye(z):
    return torch.eye(z.shape[1], device=z.device)


def _ramp(z):
    return torch.linspace(0, 1, z.numel(), device=z.device).view_as(z)


LOSSES = {
    "barlow_twins": lambda a, b, c, d: barlow_twins_loss(a, b),
    "barlow_twins, gram": lambda a, b, c, d: barlow_twins_loss(a, b, form="gram"),
    "ssl_ey": lambda a, b, c, d: ssl_ey_loss(a, b),
    "vicreg": lambda a, b, c, d: vicreg_loss(a, b),
    "vicreg, gram": lambda a, b, c, d: vicreg_loss(a, b, form="gram"),
    "ssl_ey, split": lambda a, b, c, d: ssl_ey_loss(a, b, estimator="split"),
    "ssl_ey, ustat": lambda a, b, c, d: ssl_ey_loss(a, b, estimator="ustat"),
    "byol": lambda a, b, c, d: byol_loss(a, c),
    "byol, euclidean": lambda a, b, c, d: byol_loss(a, c, metric="euclidean"),
    "i_vne": lambda a, b, c, d: i_vne_loss(a, b),
    "i_vne, covariance": lambda a, b, c, d: i_vne_loss(a, b, form="covariance"),
    "i_vne, gram": lambda a, b, c, d: i_vne_loss(a, b, form="gram"),
    "isoloss": lambda a, b, c, d: isoloss(a, b, c),
    "cissl": lambda a, b, c, d: cissl_loss([a, b], [c, d]),
    "cissl, other": lambda a, b, c, d: cissl_loss([a, b], [c, d], positives="other"),
    "corinfomax": lambda a, b, c, d: corinfomax_loss(a, b),
    "dissl": lambda a, b, c, d: dissl_loss([c, d], [a, b]),
    "dissl, one teacher view": lambda a, b, c, d: dissl_loss([c], [a, b]),
    "lejepa": lambda a, b, c, d: lejepa_loss([a, b, c, d], _eye(a), large=2),
    "matrix_ssl": matrix_ssl_loss,
    "matrix_ssl, covariance": partial(matrix_ssl_loss, form="covariance", mce_mu=0.5),
    "matrix_ssl, exact": partial(matrix_ssl_loss, logarithm="exact"),
    "matrix_ssl, exact, covariance": partial(matrix_ssl_loss, logarithm="exact", form="covariance"),
    "matrix_ssl, exact, gram": partial(matrix_ssl_loss, logarithm="exact", form="gram"),
    "rectified_lpjepa": lambda a, b, c, d: rectified_lpjepa_loss([a, b, c, d], _eye(a), _ramp(a)),
    "rectified_lpjepa, svd": lambda a, b, c, d: rectified_lpjepa_loss(
        [a, b, c, d], _eye(a), _ramp(a), projection_vectors_type="torch_svd_and_random"
    ),
    "relic": lambda a, b, c, d: relic_loss([a, b], [c, d]),
    "relic, column": lambda a, b, c, d: relic_loss([a, b], [c, d], kl="column", stop="none", pairs="all"),
    "relic, subset": lambda a, b, c, d: relic_loss([a, b], [c, d], stop="entropy", candidates=torch.tensor([1])),
    "simclr": lambda a, b, c, d: simclr_loss([a, b, c, d]),
    "simdino": lambda a, b, c, d: simdino_loss([a, b], [c, d]),
    "simdino, student": lambda a, b, c, d: simdino_loss([a, b], [c, d], eps=0.5, expansion_of="student"),
    "mec": partial(mec_loss, eps_d=0.5),
    "mec, strong": partial(mec_loss, eps_d=1 / 32),
    "cpc": lambda a, b, c, d: _cpc(a, b),
    "pirl": lambda a, b, c, d: _pirl(a, b),
    "pirl, nce": lambda a, b, c, d: _pirl(a, b, form="nce"),
    "pirl, nce_paper": lambda a, b, c, d: _pirl(a, b, form="nce_paper"),
}
"""Each of four views: predictions, or a student's outputs, of two views and a teacher's."""
_MATRIX = ["p0", "p1", "target0", "target1"]
NAMES = {
    "barlow_twins": ["z0", "z1"],
    "ssl_ey": ["z0", "z1"],
    "vicreg": ["z0", "z1"],
    "byol": ["p", None, "target"],
    "i_vne": ["z0", "z1"],
    "isoloss": ["z", "p", "target"],
    "cissl": [r"student\[0\]", r"student\[1\]", r"teacher\[0\]", r"teacher\[1\]"],
    "corinfomax": ["z0", "z1"],
    "dissl": [r"student_logits\[0\]", r"student_logits\[1\]", r"teacher_logits\[0\]", r"teacher_logits\[1\]"],
    "lejepa": [rf"views\[{view}\]" for view in range(4)],
    "matrix_ssl": _MATRIX,
    "mec": _MATRIX,
    "cpc": [r"targets, predictions\[1\]"] * 2,
    "pirl": ["z_image", "z_patches"],
    "rectified_lpjepa": [rf"views\[{view}\]" for view in range(4)],
    "relic": [r"online\[0\]", r"online\[1\]", r"target\[0\]", r"target\[1\]"],
    "simdino": [r"student\[0\]", r"student\[1\]", r"teacher\[0\]", r"teacher\[1\]"],
    "simclr": [rf"views\[{view}\]" for view in range(4)],
}
"""How an error message calls the four views."""
LEAST = {"ssl_ey, split": 4, "ssl_ey, ustat": 4}


def _random(rows, width, generator):
    return torch.randn(rows, width, generator=generator)


BATCHES = {
    "normal": _random,
    "equal rows": lambda n, d, g: _random(1, d, g).expand(n, d).clone(),
    "zero": lambda n, d, g: torch.zeros(n, d),
    "one row is not zero": lambda n, d, g: torch.cat([torch.zeros(n - 1, d), _random(1, d, g)]),
    "each row twice": lambda n, d, g: _random(n, d, g)[torch.arange(n) // 2],
    "on a line": lambda n, d, g: _random(n, 1, g) * _random(1, d, g),
    "in a plane": lambda n, d, g: _random(n, 2, g) @ _random(2, d, g),
    "beside a large mean": lambda n, d, g: _random(n, d, g) + 1000 * _random(1, d, g),
    "one column dominates": lambda n, d, g: _random(n, d, g) + 1000 * torch.eye(d)[0],
    "times 1e-4": lambda n, d, g: 1e-4 * _random(n, d, g),
    "times 100": lambda n, d, g: 100 * _random(n, d, g),
    "times 1e4": lambda n, d, g: 1e4 * _random(n, d, g),
}
SHAPES = [(2, 5), (6, 40), (40, 6)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches_give_finite_losses_and_gradients(name, device):
    for (kind, batch), shape, seed in itertools.product(BATCHES.items(), SHAPES, range(2)):
        generator = torch.Generator().manual_seed(seed)
        views = [batch(*shape, generator) for _ in range(2)]
        views = [*views, *views] if seed else [*views, *(batch(*shape, generator) for _ in range(2))]
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if shape[0] < LEAST.get(name, 2):
                continue
            # to float32 once more: the gradient of a loss that grows with the embedding may exceed float16's largest
            # number, which a GradScaler answers for
            free = [view.to(device, dtype).float().requires_grad_() for view in views]
            loss = LOSSES[name](*free)
            assert loss.isfinite(), (kind, shape, seed, dtype)
            for gradient in torch.autograd.grad(loss, free, allow_unused=True):
                assert gradient is None or gradient.isfinite().all(), (kind, shape, seed, dtype)
            with torch.no_grad():
                halves = LOSSES[name](*(view.to(dtype) for view in free))
            assert halves.dtype == torch.float32 and halves.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("form", ["covariance", "gram"])
def test_exact_logarithm_of_equal_rows_is_finite(form):
    """Their covariance is rounding errors: LAPACK's float32 solver raised or gave NaN for one in five."""
    for seed in range(160):
        z = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)).expand(6, 40).clone().requires_grad_()
        loss = matrix_ssl_loss(z, z, z, z, logarithm="exact", form=form)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(0, abs=1e-5) and gradient.isfinite().all(), seed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", LOSSES)
def test_an_input_that_is_not_finite_is_named(name, value):
    """On the CPU; on a GPU it shows in the loss, so that nothing waits for the device."""
    views = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    kind = name.partition(",")[0]
    two, three = (
        ("barlow_twins", "corinfomax", "cpc", "i_vne", "pirl", "ssl_ey", "vicreg"),
        ("byol", "isoloss", "dissl, one"),
    )
    used = 2 if name.startswith(two) else 3 if name.startswith(three) else 4
    for index in range(used):
        if name.startswith("byol") and index == 1:
            continue
        broken = [view.clone() for view in views]
        broken[index][2, 3] = value
        with pytest.raises(NotFiniteError, match=f" finite numbers, got NaN or inf in {NAMES[kind][index]}; lower "):
            LOSSES[name](*broken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            if "exact" not in name:  # a solver may raise by itself
                assert not LOSSES[name](*broken).isfinite(), "without the check, as on a GPU"


_CALLS = {
    "matrix_ssl_loss": (matrix_ssl_loss, {}),
    "matrix_ssl_terms": (lambda *a, **k: matrix_ssl_terms(*a, **k).loss, {}),
    "MatrixSSLLoss": (MatrixSSLLoss(), {}),
    "mec_loss": (mec_loss, {"eps_d": 0.5}),
    "mec_terms": (lambda *a, **k: mec_terms(*a, **k).loss, {"eps_d": 0.5}),
    "MECLoss": (MECLoss(eps_d=0.5), {}),
}


@pytest.mark.parametrize("name", _CALLS)
def test_predictions_are_p_and_the_teachers_are_targets(name):
    """By position as ever; by keyword p0, p1 get the gradient, as in byol_loss and isoloss."""
    call, options = _CALLS[name]
    a, b, c, d = (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    free = [a.requires_grad_(), b.requires_grad_()]
    expected = call(a, b, c, d, **options)
    gradients = torch.autograd.grad(expected, free)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (
            call(p0=a, p1=b, target0=c, target1=d, **options),
            call(a, p1=b, target0=c, target1=d, **options),
            call(a, b, target0=c, target1=d, **options),
        ):
            assert torch.equal(found, expected)
            torch.testing.assert_close(torch.autograd.grad(found, free), gradients)
    for args, names in (
        ((), {"z0": a, "z1": b, "p0": c, "p1": d}),
        ((a,), {"z1": b, "p0": c, "p1": d}),
        ((a, b), {"p0": c, "p1": d}),
        ((a, b, c), {"p1": d}),
    ):
        with pytest.warns(FutureWarning, match="now called p0, p1") as caught:
            found = call(*args, **names, **options)
        assert torch.equal(found, expected) and len(caught) == 1
    for args, names in (((), {"z0": a, "z1": b, "target0": c, "target1": d}), ((a, b), {"p0": c, "target1": d})):
        with pytest.raises(TypeError, match=r"got the former names (z0, z1|p0) mixed with target"):
            call(*args, **names, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_backbone_is_an_error_of_every_method_that_names_the_view(name):
    spec = METHODS[name]
    narrow = {"proj_hidden_dim": 8, "proj_output_dim": 8, "pred_hidden_dim": 8, "n_classes": 8, "heads": f"fork_{name}"}
    narrow.update(NARROW)
    options = spec.resolve({key: value for key, value in narrow.items() if key in spec.options})
    torch.manual_seed(0)
    head, predictor = spec.head(8, options), spec.predictor(options, LOCAL) if spec.predictor else None
    maps = []
    if taps := spec.taps(options):
        head.build([4] * len(taps))
        maps = toy_maps(6, [4] * len(taps), dtype=torch.float32)
    objective = Objective(spec, options, LOCAL, predictor, head)
    objective.allocate(10)
    features = [*(torch.randn(6, 8) for _ in range(view_count(spec))), *toy_stacks(spec, options, 6, 8)]
    predict, index = predictor.predict if predictor else None, torch.arange(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the watch over the series warns too
        terms = objective(embed(features, head, predict, index=index, maps=maps))
        assert terms.loss.isfinite()
        assert [name for name, term in terms._asdict().items() if term.requires_grad] == ["loss"], (
            "the others are logged"
        )
        features[-1][2, ..., 3] = float("nan")
        both = "z of view 0, " if isinstance(head, SharedHead) else ""  # the views share the batch statistics
        with pytest.raises(
            NotFiniteError,
            match=f"^the loss needs finite numbers, got NaN or inf in {both}z of view {len(features) - 1}",
        ):
            objective(embed(features, head, predict, index=index, maps=maps))


def _broken_rank(comm, name, views):
    try:
        CALLS_OF_RANKS[name](*views, comm)
    except NotFiniteError as error:
        return str(error)
    return ""


CALLS_OF_RANKS = {
    "the Barlow Twins loss": lambda a, b, comm: barlow_twins_loss(a, b, comm=comm),
    "the BYOL loss": lambda a, b, comm: byol_loss(a, b, comm=comm),
    "the I-VNE+ loss": lambda a, b, comm: i_vne_loss(a, b, comm=comm),
    "the CorInfoMax loss": lambda a, b, comm: corinfomax_loss(a, b, comm=comm),
    "the IsoLoss": lambda a, b, comm: isoloss(a, a, b, comm=comm),
    "the SSL-EY loss": lambda a, b, comm: ssl_ey_loss(a, b, comm=comm),
    "the VICReg loss": lambda a, b, comm: vicreg_loss(a, b, comm=comm),
    "a contrastive loss": lambda a, b, comm: cissl_loss([a, b], [a, b], comm=comm),
    "the DISSL loss": lambda a, b, comm: dissl_loss([a, b], [a, b], comm=comm),
    "the ReLIC loss": lambda a, b, comm: relic_loss([a, b], [a, b], comm=comm),
    "the LeJEPA loss": lambda a, b, comm: lejepa_loss([a, b], _eye(a), comm=comm),
    "the Rectified LpJEPA loss": lambda a, b, comm: rectified_lpjepa_loss([a, b], _eye(a), torch.ones(8, 3), comm=comm),
    "the SimCLR loss": lambda a, b, comm: simclr_loss([a, b], comm=comm),
    "the SimDINO loss": lambda a, b, comm: simdino_loss([a, b], [a, b], comm=comm),
    "the Matrix-SSL loss": lambda a, b, comm: matrix_ssl_loss(a, b, a, b, comm=comm),
    "the MEC loss": lambda a, b, comm: mec_loss(a, b, a, b, eps_d=0.5, comm=comm),
}


@pytest.mark.ddp
@pytest.mark.parametrize("name", CALLS_OF_RANKS)
def test_every_process_stops_when_one_has_rows_that_are_not_finite(name, ranks):
    """None waits for the others in a collective of the backward pass."""
    views = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    views[3][1, 2] = torch.nan
    first, second = ranks.run(_broken_rank, [(name, views[:2]), (name, views[2:])])
    assert second.startswith(f"{name} needs finite numbers, got NaN or inf in ")
    assert first == second.replace("; ", " of another process; ")
