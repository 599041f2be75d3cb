"""The option log_quality: the objective, and all three adapters."""

import pytest
import torch
from torch import nn

from plugins.distributed import LOCAL
from plugins.methods import METHODS
from plugins.metrics import Quality
from plugins.objective import Objective, embed

SMALL = {"proj_hidden_dim": 6, "proj_output_dim": 4}


def _objective(**options):
    spec = METHODS["ssl_ey"]
    options = spec.resolve({**SMALL, **options})
    head = spec.head(5, options)
    return Objective(spec, options, LOCAL, None, head), head


def _features(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, generator=generator) for _ in range(2)]


def test_an_epoch_has_the_quality_of_its_features_and_projections():
    objective, head = _objective(log_quality=True)
    objective(embed(_features(9), head))
    objective.start_epoch(0)  # what an interrupted epoch has left
    expected = {"features": Quality(), "projections": Quality()}
    for seed in range(3):
        e = embed(_features(seed), head)
        objective(e)
        expected["features"].update(_features(seed))
        expected["projections"].update(e.z)
    objective.eval()(embed(_features(7), head))  # an evaluation does not count
    found = objective.epoch_quality()
    wanted = {
        f"quality/{kind}/{name}": value
        for kind, quality in expected.items()
        for name, value in quality.values()._asdict().items()
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) or (found[name].isnan() and value.isnan()), name
    assert objective.epoch_quality() == {}


@pytest.mark.parametrize("where", ["features", "projections"])
def test_one_of_the_two_can_be_chosen(where):
    objective, head = _objective(log_quality=where)
    objective(embed(_features(0), head))
    assert {name.split("/")[1] for name in objective.epoch_quality()} == {where}


def test_it_is_off_by_default_and_adds_nothing_to_a_checkpoint():
    plain, logging = _objective()[0], _objective(log_quality=True)[0]
    assert plain.quality is None and plain.epoch_quality() == {}
    assert plain.state_dict().keys() == logging.state_dict().keys()


@pytest.mark.parametrize("value", [1, "yes", None])
def test_another_value_is_refused(value):
    with pytest.raises(ValueError, match="log_quality must be"):
        METHODS["ssl_ey"].resolve({"log_quality": value})


def test_too_wide_projections_are_refused_before_the_training():
    error = "at most 8192 columns, got projections with 9000; set log_quality=features"
    with torch.device("meta"), pytest.raises(ValueError, match=error):
        _objective(log_quality=True, proj_output_dim=9000)
    with torch.device("meta"):
        _objective(log_quality="features", proj_output_dim=9000)


class _Flat(nn.Module):
    """A backbone whose features can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


@pytest.mark.lightly
def test_joined_micro_batches_have_the_quality_of_their_rows():
    from lightly_ext.models import SSLEY

    views = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    model = SSLEY(_Flat(), input_dim=5, log_quality="features", **SMALL)
    model.joined_loss([[view[:3] for view in views], [view[3:] for view in views]])
    expected = Quality()
    expected.update([model.backbone(view) for view in views])
    found = model.epoch_quality()
    for name, value in expected.values()._asdict().items():
        torch.testing.assert_close(found[f"quality/features/{name}"], value, rtol=1e-5, atol=1e-6, equal_nan=True)
