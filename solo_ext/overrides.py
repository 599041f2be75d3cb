"""Methods that need more of solo-learn than a MethodSpec says. Most methods are not here."""

from typing import Any

from solo_ext.method import TeacherlessMethod


class SimSiamMethod(TeacherlessMethod):
    """SimSiam keeps its predictor's learning rate constant (Chen and He 2021, §4.2)."""

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Parameter groups, the predictor's without schedule."""
        groups = super().learnable_params
        return [{**group, "static_lr": True} if group["name"] == "predictor" else group for group in groups]


OVERRIDES: dict[str, type] = {"simsiam": SimSiamMethod}
