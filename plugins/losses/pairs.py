"""Names of the matrices of pairs (prediction, target), for losses of two and of more views."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

Pair = tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]


def of_two_views(p0: Tensor, p1: Tensor, target0: Tensor, target1: Tensor) -> dict[str, Tensor]:
    """Return the matrices pair after pair, the prediction first, under the names of the caller's arguments."""
    return {"p0": p0, "target1": target1, "p1": p1, "target0": target0}


def of_pairs(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Return the matrices pair after pair, the prediction first, under names such as ``pairs[0][1]``."""
    return {f"pairs[{i}][{j}]": rows for i, pair in enumerate(pairs) for j, rows in enumerate(pair)}
