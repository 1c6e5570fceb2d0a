"""No file and no option gives a traceback, a hang or a heap of memory: damaged files and random options, seeded.

A few cases run always, four hundred with the slow tests. A failure names the number of its case.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seer_jax.commands import bench, demo, finetune, train
from seer_jax.commands import main as cli
from seer_jax.train import DistillConfig, FinetuneConfig, TrainResult
from tests.seer_jax.commands.fuzz.cases import make_world, run_file_case, run_options_case
from tests.seer_jax.commands.fuzz.damage import Outcome

FEW = 60
GROUP = 100  # cases of one test

pytestmark = [
    pytest.mark.timeout(0),  # each case has an alarm of its own, which takes the place of the tests' one
    pytest.mark.cpu,
    pytest.mark.filterwarnings("default"),  # a warning is a line on standard error, as for users
    pytest.mark.usefixtures("compile_quickly", "unchecked"),
]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What cases take copies of."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    before = Path.cwd()
    os.chdir(root)
    try:
        assert cli.main(["train", "--config", "run.yaml", "--output", "run"]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def light_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are read and checked as ever; benches, demonstrations and training steps, which any size may be asked of, are left out."""
    monkeypatch.setattr(bench, "BENCHES", {k: (c, lambda config: [], s) for k, (c, _, s) in bench.BENCHES.items()})
    monkeypatch.setattr(demo, "demo", lambda config: [])
    for module, name in ((train, "distill"), (finetune, "finetune")):
        monkeypatch.setattr(module, name, functools.partial(short, getattr(module, name)))


def short(run: Callable[[Any], TrainResult], config: DistillConfig | FinetuneConfig) -> TrainResult:
    if config.steps * config.batch_size > 8 or config.sequence_length > 256:
        raise ValueError("The run is longer than a test may be.")
    return run(config)


def check(run: Callable[[Path, Path, int], Outcome], world: Path, place: Path, numbers: range) -> None:
    os.chdir(place)
    outcomes = [(number, run(world, place, number)) for number in numbers]
    assert [(number, outcome) for number, outcome in outcomes if outcome.wrong] == []


def test_random_command_lines(tmp_path: Path, light_work: None, monkeypatch: pytest.MonkeyPatch):
    """Few, and of files that are not there: what comes after the options takes its time."""
    monkeypatch.chdir(tmp_path)
    (empty := tmp_path / "empty").mkdir()
    (place := tmp_path / "place").mkdir()
    check(run_options_case, empty, place, range(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("group", range(2))
@pytest.mark.parametrize("run", [run_file_case, run_options_case])
def test_hundreds_of_cases(
    run: Any, group: int, world: Path, tmp_path: Path, light_work: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    check(run, world, tmp_path, range(group * GROUP, (group + 1) * GROUP))
