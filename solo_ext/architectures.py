"""Architectures beside solo-learn's own."""

from collections.abc import Callable
from typing import Any

ARCHITECTURES: dict[str, Callable[..., Any]] = {}
