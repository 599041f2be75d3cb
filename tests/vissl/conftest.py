"""Digits and runs of the launcher that the VISSL tests share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vissl_ext  # noqa: F401 - mends VISSL before a test imports it

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def few_digits(thin_digits: Callable[[int, int], Path]) -> Path:
    """The real digits, thinned out: 96 training and 40 validation images."""
    return thin_digits(96, 40)


@pytest.fixture(scope="session")
def on() -> Callable[..., list[str]]:
    """on(device, count=1) → the launcher's overrides; skips where there are fewer GPUs than that."""

    def overrides(device: str, count: int = 1) -> list[str]:
        if device == "cpu":
            return ["config.MACHINE.DEVICE=cpu", "config.DISTRIBUTED.BACKEND=gloo"]
        found = torch.cuda.device_count()
        if found < count:
            pytest.skip(f"NOT TESTED on a GPU: this needs {count}, there are {found}")
        return ["config.MACHINE.DEVICE=gpu", "config.DISTRIBUTED.BACKEND=nccl"]

    return overrides


@pytest.fixture(scope="session")
def start_launch(few_digits: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start_launch(*overrides) → the process of the launcher, where datasets/digits are the thinned digits."""
    started: list[subprocess.Popen] = []

    def start(*overrides: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vissl_ext.launch", *overrides],
            cwd=few_digits.parents[1],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def launch(start_launch: Callable[..., subprocess.Popen]) -> Callable[..., str]:
    """launch(*overrides) → what the launcher printed, once it has ended well."""

    def run(*overrides: str) -> str:
        process = start_launch(*overrides)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-6000:]
        return printed

    return run


@pytest.fixture(scope="session")
def launches() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """launches(jobs) → their results, from one process that has imported VISSL once; see runner.py."""

    def run(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        process = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name("runner.py"))],
            input=json.dumps(jobs),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(process.stdout)

    return run
