"""The extension of a model's context: a small one from end to end that is resumed, tables of stored results, stages in their order."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import seer_jax.train
from seer_jax import tiny_lm
from seer_jax.convert import load_gates, save_base, save_gates
from seer_jax.evaluate import Phase, Score, WindowScore, write_scores
from seer_jax.gates.configs import PrefillGateConfig
from seer_jax.models.config import RopeConfig
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.rules import TopK
from seer_jax.smollm2.extension import __main__ as command
from seer_jax.smollm2.extension.config import USUAL, ExtensionConfig, Stage
from seer_jax.smollm2.extension.measuring import Measuring
from seer_jax.smollm2.extension.run import Facts
from seer_jax.smollm2.extension.table import write_results
from seer_jax.smollm2.extension.training import train, train_from_scratch
from seer_jax.train import FinetuneConfig
from seer_jax.train.finetuning import check
from tests.seer_jax.conftest import LLAMA, tiny_model


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line for a tiny model with the bundled tokenizer, and its gate."""
    shape = dataclasses.replace(LLAMA, vocab_size=4096, num_layers=1, rope=RopeConfig(), max_position_embeddings=64)
    model = tiny_model(shape, block_size=64)
    assert model.prefill_gate is not None
    save_base(model, tmp_path / "base")
    save_gates(model.prefill_gate, tmp_path / "gate", base_model=tmp_path / "base")
    shutil.copy(tiny_lm.path() / "tokenizer.json", tmp_path / "base")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "one two three\n" * 400}) + "\n")
    (tmp_path / "heldout.txt").write_text("four five six\n" * 200)
    texts = ["--train", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "heldout.txt")]
    sizes = "--length 256 --steps 2 --batch-size 2 --windows 2 --calibration-windows 1 --passkeys 0 --workers 1"
    names = ["--model", str(tmp_path / "base"), "--gate", str(tmp_path / "gate"), "--output", str(tmp_path / "out")]
    return [*texts, *names, *sizes.split(), "--densities", "0.5"]


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
def test_stages_follow_each_other_and_are_not_done_twice(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert command.main([*words, "--stage", "yarn", "gates"]) == 0
    assert command.main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(results["stages"][stage]["finished"] for stage in USUAL)
    assert results["stages"]["yarn"]["tokens"] == 2 * 2 * 256
    rows = {(row["model"], row["level"]): row for row in results["rows"]}
    assert {level for _, level in rows} == {"dense", "topk:0.5", "calibrated:0.5"}
    assert {name for name, _ in rows} == {"after", "joint"}
    scores = {path: path.read_bytes() for path in (tmp_path / "out" / "measured").rglob("*.json")}
    capsys.readouterr()
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "learned gate" not in said and "step 2" not in said
    assert {path: path.read_bytes() for path in scores} == scores


REFUSED = [
    (["--length", "100"], "length must be a multiple of the block size, 64, .* got 100"),
    (["--densities", "1.5"], r"densities must be shares in \(0, 1\), at least one; got \(1\.5,\)"),
    (["--scratch-density", "1.5"], r"scratch_density must be a share in \(0, 1\); got 1\.5"),
    (["--factor", "1"], r"factor must be above 1, .*; got 1\.0"),
    (["--batch-size", "3", "--micro-batch-size", "2"], r"micro_batch_size must divide batch_size; got 2 and 3"),
    *(
        (["--" + name.replace("_", "-"), "0"], rf"{name} must be at least 1; got 0")
        for name in ("gate_steps", "checkpoint_interval")
    ),
    (["--model", "owner/name"], "gate must be a prefill gate of owner/name; got none"),
    ([], "missing.jsonl is not there"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_wrong_settings_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    given = ["--train", "missing.jsonl", "--held-out", "missing.txt", "--output", "out", "--model", "tiny-lm", *words]
    with pytest.raises(SystemExit, match=r"2" if words else "1"):
        raise SystemExit(command.main(given))
    assert re.search(message, " ".join(re.sub("[^ -~]", " ", capsys.readouterr().err).split()))


@pytest.mark.parametrize("model", ["tiny-lm", "smollm2"])
def test_the_gate_of_a_named_model_is_found(model: str):
    config = ExtensionConfig(Path("x"), Path("y"), Path("z"), model=model)
    assert isinstance(load_gates(config.initial_gate).config, PrefillGateConfig)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("gates", "Stage gates needs stage yarn, which is not finished. Run it first."),
        ("score", "Stage score needs a model to measure; none is finished. Run yarn and gates, or joint, first."),
    ],
)
def test_a_stage_needs_those_before_it(stage: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("train", "heldout"):
        (tmp_path / name).write_text("x")
    texts = ["--train", str(tmp_path / "train"), "--held-out", str(tmp_path / "heldout")]
    assert command.main([*texts, "--output", str(tmp_path), "--model", "tiny-lm", "--stage", stage]) == 1
    assert message in capsys.readouterr().err


def test_a_stage_that_is_stopped_is_not_finished(tmp_path: Path):
    config = ExtensionConfig(Path("x"), Path("y"), tmp_path, model="tiny-lm")
    assert config.stages == USUAL

    def stopped() -> dict:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        Facts(config).run(Stage.YARN, stopped)
    facts = Facts(config)
    assert not facts.finished(Stage.YARN) and facts.of(Stage.YARN)["seconds"] >= 0
    facts.run(Stage.YARN, lambda: {"tokens": 7})
    assert Facts(config).finished(Stage.YARN) and Facts(config).of(Stage.YARN)["tokens"] == 7

    def refused() -> dict:
        raise ValueError("another length")

    with pytest.raises(ValueError, match="another length"):
        facts.run(Stage.YARN, refused)
    assert Facts(config).finished(Stage.YARN)


def test_every_stage_has_settings_that_training_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken: list[Any] = []

    def take(run: Any, progress: object) -> SimpleNamespace:
        assert run.output is not None
        if isinstance(run, FinetuneConfig):
            check(run, reads_text=True)
        taken.append(run)
        Path(run.output).mkdir(parents=True, exist_ok=True)
        (Path(run.output) / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5}))
        return SimpleNamespace(step=run.steps)

    for name in ("distill", "finetune"):
        monkeypatch.setattr(seer_jax.train, name, take)
    config = ExtensionConfig(Path("x"), Path("y"), tmp_path, model="tiny-lm", scratch_density=0.3)
    (tmp_path / "yarn" / "model").mkdir(parents=True)
    for stage in (Stage.YARN, Stage.GATES, Stage.JOINT, Stage.DISTIL):
        assert train(config, stage, print) == taken[-1].steps * config.batch_size * config.length
    curves = train_from_scratch(config, print)
    assert curves["dense"] == curves["sparse"] == [{"step": 1, "loss": 2.5}]
    assert [bool(run.initial_gates) for run in taken] == [False, False, True, True, False, True]
    assert taken[-1].density == 0.3 and taken[3].distil and taken[2].yarn_factor == config.factor


def test_policies_are_of_their_model_and_windows(tmp_path: Path):
    """What was calibrated on other windows, or of another model, is not measured."""
    (tmp_path / "heldout.txt").write_text("x")
    for folder in ("yarn/model", "gates/prefill_gate", "measured/after"):
        (tmp_path / folder).mkdir(parents=True)
    config = ExtensionConfig(Path("x"), tmp_path / "heldout.txt", tmp_path, model="tiny-lm")
    kept = {"of": Measuring(config)._identity("after"), "policies": {"calibrated:0.1": {}}}
    (tmp_path / "measured" / "after" / "policies.json").write_text(json.dumps(kept))
    assert Measuring(config)._policies("after") == kept["policies"]
    assert Measuring(dataclasses.replace(config, calibration_windows=4))._policies("after") == {}
    (tmp_path / "gates" / "prefill_gate" / "config.json").write_text("{}")
    assert Measuring(config)._policies("after") == {}


def test_the_table_is_made_of_what_is_stored(tmp_path: Path):
    def score(method: str | None, density: float, loss: float) -> Score:
        windows = tuple(WindowScore(2 + loss + noise, density) for noise in (0.0, 0.1))
        policy = policy_to_json(TopK(density)) if method else {"rule": "dense"}
        level = f"topk:{density:g}" if method else "dense"
        return Score(Phase.PREFILL, method, level, windows, (), 8, 1.0, policy)

    for name, loss in (("after", 0.3), ("joint", 0.06)):
        (tmp_path / "measured" / name).mkdir(parents=True)
        scores = [score(None, 1.0, 0.0), score("gate", 0.1, loss)]
        write_scores(tmp_path / "measured" / name / "scores.json", scores)
    stages = {"yarn": {"seconds": 61.2, "finished": False}, "joint": {"seconds": 5.0, "tokens": 1234, "finished": True}}
    (tmp_path / "facts.json").write_text(json.dumps(stages))
    text = write_results(tmp_path)
    assert "| dense YaRN | dense | 100.0% | 7.768 | - | - | 8.79 (+0.0%) |" in text
    assert "| YaRN with gates | topk:0.1 | 10.0% | 8.248 | +6.18% (+6.18% to +6.18%) | - | 9.16 (+4.2%) |" in text
    assert "| yarn | 61 (not finished) | - |" in text and "| joint | 5 | 1,234 |" in text
    assert "as a share of that of gates after YaRN: topk:0.1 0.18." in text
    assert json.loads((tmp_path / "results.json").read_text())["losses"]["topk:0.1"] == pytest.approx(0.1768, abs=1e-3)
