"""Tests of this folder hold float32 base models to float32 bounds. Most runs here are of the same program."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from seer_jax.train import TrainResult
from tests.train.runs import run_to


@pytest.fixture(scope="module", autouse=True)
def products(exact_products: None) -> None:
    """As a user who compares models asks for them."""


@pytest.fixture(scope="session")
def runs() -> list[tuple[Path, TrainResult]]:
    """The one run of `undisturbed`, once it was made."""
    return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, runs, compile_quickly):
    """(folder, result) of the run that others are compared with: a copy for each module, whose tests may change it."""
    if not runs:
        folder = tmp_path_factory.mktemp("first")
        runs.append((folder, run_to(folder)))
    (first, result), folder = runs[0], tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(first, folder)
    return folder, dataclasses.replace(result, gates=tuple(folder / gate.name for gate in result.gates))
