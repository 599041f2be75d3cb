"""Every number among the methods' options has a range; a value outside is an error before anything is built."""

import math
import re

import pytest

from plugins.distributed import LOCAL
from plugins.methods import METHODS

NUMBERS = [
    (name, key)
    for name, spec in sorted(METHODS.items())
    for key, option in spec.options.items()
    if type(option.default) in (int, float)
]


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_every_number_has_a_range(name, key):
    spec = METHODS[name]
    option = spec.options[key]
    assert option.low is not None and option.low <= option.default <= option.high
    kind = type(option.default)
    assert spec.resolve({key: kind(option.low)})[key] == option.low, "the least value is allowed"
    wrong = [kind(option.low) - 1, *([kind(option.high) + 1] if option.high < math.inf else [])]
    if kind is float:
        wrong += [math.nan, math.inf, -math.inf]
        assert ("> 0" in option.help) == (option.low == 1e-6)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^method {name}: {key} must be in \[{option.low:g}, .*, got {value!r}$"):
            spec.resolve({key: value})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *[("cissl", "temperature", 0), ("cissl", "proj_output_dim", 0)],
        *[("dissl", "tau_teacher", 0), ("dissl", "tau_student", -1), ("dissl", "n_classes", 1)],
        *[("dissl", "beta_H_MlZ", -1), ("dissl", "beta_pM_unif", -1), ("dissl", "lambda_maximality", math.nan)],
        *[("dissl", "warmup_beta_iter", -1), ("dissl", "warmup_teacher_iter", -1), ("dissl", "stall_alarm_iter", -1)],
        *[("isoloss", "rho", 2), ("isoloss", "every", 0), ("directcopy", "eps_iso", -0.1), ("isocopy", "alpha", -1)],
        *[("byol", "pred_lr_scale", -1), ("simsiam", "pred_hidden_dim", 0), ("ssl_ey", "proj_hidden_dim", 0)],
        *[("matrix_ssl", "mce_order", 0), ("matrix_ssl", "mce_mu", -1), ("matrix_ssl", "mce_mu", math.nan)],
        *[("matrix_ssl", "mce_lambd", -1), ("matrix_ssl", "gamma", -1), ("mec", "warmup_iter", -1)],
        *[("mec", "eps", 0), ("mec", "eps", -64), ("mec", "eps", math.inf), ("mec", "mec_order", 0)],
    ],
)
def test_numbers_out_of_range_are_refused_by_the_name_that_was_given(name, key, value):
    with pytest.raises(ValueError, match=rf"^method {name}: {key} must be in .*, got {value}"):
        METHODS[name].resolve({key: value})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("matrix_ssl", {"mce_order": 0}, "mce_order must be in [1, inf), got 0"),
        ("matrix_ssl", {"mce_mu": -1.0}, "mce_mu must be in [0, inf), got -1.0"),
        ("matrix_ssl", {"mce_mu": math.nan}, "mce_mu must be in [0, inf), got nan"),
        ("matrix_ssl", {"mce_lambd": -1.0}, "mce_lambd must be in [0, inf), got -1.0"),
        ("matrix_ssl", {"gamma": -1.0}, "gamma must be in [0, inf), got -1.0"),
        ("matrix_ssl", {"mce_mu": 0.0, "logarithm": "exact"}, "mce_mu must be in [1e-06, inf), got 0.0"),
        ("mec", {"eps": 0.0}, "eps must be in [0.002048, inf), got 0.0"),  # 1e-6 for each of 2048 dimensions
        ("mec", {"eps": 1e-4, "proj_output_dim": 256}, "eps must be in [0.000256, inf), got 0.0001"),
        ("mec", {"eps": -64.0, "warmup_iter": 80}, "eps must be in [0.002048, inf), got -64.0"),
        ("mec", {"mec_order": 0}, "mec_order must be in [1, inf), got 0"),
        ("mec", {"warmup_iter": -1}, "warmup_iter must be in [0, inf), got -1"),
    ],
)
def test_the_losses_refuse_what_goes_together_with_nothing(name, given, message):
    spec = METHODS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.loss({**spec.resolve({}), **given}, LOCAL)


def test_the_bounds_go_together_with_the_losses_own():
    """The least values of all options at once make a loss, as the defaults do."""
    for spec in METHODS.values():
        least = {
            key: type(option.default)(option.low) for key, option in spec.options.items() if option.low is not None
        }
        spec.loss(spec.resolve(least), LOCAL)
