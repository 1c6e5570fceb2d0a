"""`seer-jax finetune`: a run with YaRN and adapters on a tiny model, what it leaves, and what it refuses."""

import re
from pathlib import Path

import pytest

from seer_jax import from_pretrained, load_tokenizer
from seer_jax.commands import main as cli
from seer_jax.commands.finetune import RECIPES, Recipe
from seer_jax.lora import lora_config
from seer_jax.models.config import RopeKind

TEXT = "def main():\n    # three birds: 🦜🦜🦜\n" * 80
RUN = ["--sequence-length", "64", "--batch-size", "1", "--dtype", "float32", "--no-tensorboard", "--log-interval", "1"]

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_a_run_leaves_a_model_and_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    words = ["finetune", "--recipe", "lora", "--model", "tiny-lm", "--data.paths", str(tmp_path / "text.txt")]
    words += [
        *RUN,
        "--output",
        str(out),
        "--yarn-factor",
        "4",
        "--lora.rank",
        "2",
        "--lora.targets",
        "q_proj",
        "v_proj",
    ]
    assert cli.main([*words, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert f"Adapter: {out}/adapter\nModel: {out}/model\nUse it: seer-jax generate --model {out}/model --prompt" in said
    plain, model = (from_pretrained(place, dtype="float32") for place in ("tiny-lm", out / "model"))
    assert model.config.rope.kind is RopeKind.YARN and model.config.context == 4 * plain.config.context
    assert load_tokenizer(out / "model").encode("def") == load_tokenizer("tiny-lm").encode("def")
    found = lora_config(from_pretrained("tiny-lm", adapter=out / "adapter"))
    assert found is not None and (found.rank, found.alpha, found.targets) == (2, 32.0, ("q_proj", "v_proj"))
    assert cli.main(["finetune", "--config", str(out / "config.json")]) == 0
    assert "Resuming after step 2." in capsys.readouterr().out
    assert cli.main([*words, "--steps", "2", "--lora.rank", "4"]) == 1
    assert re.search(r"finetune: --lora\.rank: this run was started with 2; got 4\. Restore --lora\.rank 2 to", capsys.readouterr().err)  # fmt: skip


def test_the_recipes_train_105_million_tokens():
    for recipe, rate, rank in ((Recipe.FULL, 1e-5, 0), (Recipe.LORA, 1e-4, 16)):
        config = RECIPES[recipe]()
        assert (config.optimizer.learning_rate, config.lora.rank, config.sequence_length) == (rate, rank, 32768)
        assert round(config.steps * config.batch_size * config.sequence_length / 1e6) == 105


BASE = "--model tiny-lm --output x"
REFUSED = [
    ("--model tiny-lm", 2, r"--output must be a folder for the model and checkpoints; got none\. Pass --output FOLDER"),
    ("--output x", 2, r"--model must be a base model; got none"),
    (f"{BASE} --recipe all", 2, r"--recipe must be one of full, lora; got 'all'"),
    (f"{BASE} --recipe full --config x.yaml", 2, r"--config and --recipe both give the settings"),
    (f"{BASE} --yarn-factor 1", 2, r"--yarn-factor must be a number above 1.*got 1\.0"),
    (f"{BASE} --lora.rank -1", 2, r"--lora\.rank must be at least 0; got -1"),
    (f"{BASE} --lora.targets q_proj q_proj", 2, r"--lora\.targets must name linear maps, each once"),
    (f"{BASE} --data.paths /none", 1, r"/none"),
    (f"{BASE} --density 0.5", 1, r"--density must come with the prefill gate .* and no --initial-gates\. Name a gate"),
]


@pytest.mark.parametrize(("words", "code", "message"), REFUSED)
def test_what_is_refused(
    words: str,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", *words.split()]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
