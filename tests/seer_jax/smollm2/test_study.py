"""The study of gates: a small one that is resumed, tables of stored results, texts, and selections without training."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax.calibrate.collect import kept_mass
from seer_jax.evaluate import Phase, Score, WindowScore, score_prompts, score_windows, write_scores
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Given
from seer_jax.selection.rules import Threshold
from seer_jax.smollm2.study import __main__ as command
from seer_jax.smollm2.study import measuring
from seer_jax.smollm2.study.selections import LocalHeads, decode_masks, local_mass, overlaps, shared_masks
from seer_jax.smollm2.study.table import ERROR, FACTS, write_tables
from seer_jax.smollm2.study.texts import write_mix
from seer_jax.smollm2.study.variants import Text
from tests.seer_jax.conftest import LLAMA, tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS = np.random.default_rng(0).integers(0, 64, (1, 128)).astype(np.int32)
POLICY = Threshold(0.2, dense_last_rows=0)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for a model with random weights and the tokens of the bundled one."""
    model = tiny_model(dataclasses.replace(LLAMA, vocab_size=4096), gates=False)
    monkeypatch.setattr(measuring, "from_pretrained", lambda name, dtype: model)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "one two three\n" * 400}) + "\n")
    (tmp_path / "heldout.txt").write_text("four five six\n" * 200)
    texts = ["--train", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "heldout.txt")]
    sizes = "--model tiny-lm --length 128 --windows 2 --steps 2 --batch-size 2 --workers 1 --phases prefill"
    levels = "--thresholds 0.3 0.6 --masses --only p16x16-d16-mass"
    return [*texts, "--output", str(tmp_path / "out"), *sizes.split(), *levels.split()]


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main(words) == 0
    folder = tmp_path / "out" / "p16x16-d16-mass"
    first = (folder / "prefill" / "scores.json").read_bytes()
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert (row["variant"], row["rule"], len(row["levels"])) == ("p16x16-d16-mass", "threshold", 2)
    assert row["settings"]["target"] == "mass"
    # Per token: 4 keys of 64 channels in float32 for each block of 64 tokens, in 2 layers of 2 key heads.
    costs = json.loads((folder / FACTS).read_text())["costs"]
    assert (
        row["costs"]["key_bytes"] == costs["prefill_key_bytes"] == costs["decode_key_bytes"] == 4 * 64 * 4 / 64 * 2 * 2
    )
    assert 0 < row["costs"]["recall"] <= 1
    capsys.readouterr()

    assert command.main(words) == 0
    assert (folder / "prefill" / "scores.json").read_bytes() == first
    assert "learned gate" not in capsys.readouterr().out

    assert command.main([*words, "--windows", "3"]) == 1  # the variant alone fails, and the table says why
    assert "windows was 2, now 3" in (tmp_path / "out" / "table.md").read_text()
    assert "windows was 2, now 3" in (folder / ERROR).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "p1x1"], "only must name variants: release-max, .*; got p1x1"),
        (["--length", "100"], "length must be a multiple of the block size, 64, .* got 100"),
        (["--thresholds", "0.1"], "two thresholds at least; got 2 phases and 1 thresholds"),
        ([], "missing.jsonl is not there"),
    ],
)
def test_wrong_settings_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture):
    given = ["--train", "missing.jsonl", "--held-out", "missing.txt", "--output", "out", *words]
    with pytest.raises(SystemExit, match=r"2" if words else "1"):
        raise SystemExit(command.main(given))
    assert re.search(message, " ".join(re.sub("[^ -~]", " ", capsys.readouterr().err).split()))


def test_the_table_is_made_of_what_is_stored(tmp_path: Path):
    def loss(kept: float, at: float) -> float:
        """1% at a share of `at`."""
        return math.log1p(0.01) * math.exp(-20 * (kept - at))

    def score(method: str | None, kept: float, over: float) -> Score:
        windows = tuple(WindowScore(2 + over, kept) for _ in range(2))
        policy = policy_to_json(Threshold(kept)) if method else {"rule": "dense"}
        return Score(Phase.DECODE, method, f"threshold:{kept}" if method else "dense", windows, (), 8, 1.0, policy)

    for name, at in (("coarse", 0.3), ("fine", 0.2)):
        (tmp_path / name / "decode").mkdir(parents=True)
        levels = [score("gate", kept, loss(kept, at)) for kept in (0.1, 0.2, 0.4)]
        write_scores(tmp_path / name / "decode" / "scores.json", [score(None, 1.0, 0.0), *levels])
        costs = {"decode_key_bytes": 2, "decode_recall": 0.9, "prefill_recall": 0.5, "tokens_per_second": 7}
        (tmp_path / name / FACTS).write_text(json.dumps({"meaning": f"pools, {name}", "costs": costs}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ERROR).write_text("MemoryError: too large")

    rows = write_tables(tmp_path)
    assert [row["variant"] for row in rows] == ["fine", "coarse"]
    assert rows[0]["needed"]["kept"] == pytest.approx(0.2)
    over = {share: value["value"] for share, value in rows[0]["over_dense"].items()}
    for kept in (0.1, 0.2, 0.4):
        assert over[f"{kept:g}"] == pytest.approx(math.expm1(loss(kept, 0.2)))
    assert over["0.08"] is None
    assert rows[0]["costs"] == {"key_bytes": 2, "recall": 0.9, "tokens_per_second": 7}
    text = (tmp_path / "table.md").read_text()
    assert "| fine | threshold | 20.0%" in text
    assert text.count("fine: pools, fine") == 1
    assert "broken failed: MemoryError: too large" in text


@pytest.mark.parametrize("text", [Text.CODE, Text.PASS_KEYS])
def test_mixed_texts_are_seeded(text: Text, tmp_path: Path):
    pages = [f"page {i}\n" * 300 for i in range(40)]
    first, again, other = (
        write_mix(text, pages, tmp_path / name, characters=50_000, seed=seed).read_text()
        for name, seed in (("a", 0), ("b", 0), ("a", 1))
    )
    assert first == again != other
    documents = [json.loads(line)["text"] for line in first.splitlines()]
    assert sum(map(len, documents)) >= 50_000
    if text is Text.CODE:
        assert [document.startswith("page") for document in documents[:4]] == [True, True, True, False]
        return
    for document in documents:
        for line in (line for line in document.splitlines() if line.startswith("# What")):
            name, value = line.split("of ")[1].split("?")[0], line.split("is ")[-1]
            assert document.index(f"# The pass key of {name} is {value}") < document.index(line)


@pytest.mark.slow
def test_heads_that_are_local_read_the_first_block_and_the_latest():
    model = tiny_model()

    def masks(local: np.ndarray) -> list[float]:
        policy = LocalHeads(POLICY, jnp.asarray(local), 2)
        scores = score_prompts(model, TOKENS, policy)
        return [float(scores.kept[0]), float(scores.nll.sum())]

    plain = score_prompts(model, TOKENS, POLICY)
    assert masks(np.zeros((2, 4))) == [float(plain.kept[0]), float(plain.nll.sum())]
    # Of 8 blocks, rows read 1, 2, 3, 3, 3, ... of 1, 2, ..., 8.
    assert masks(np.ones((2, 4)))[0] == pytest.approx((1 + 2 + 6 * 3) / 36)
    decoded = score_windows(model, TOKENS, LocalHeads(POLICY, jnp.ones((2, 2)), 2))
    assert float(decoded.kept[0]) == pytest.approx((1 + 2 + 6 * 3) / 36)
    found = local_mass(model, TOKENS, 2, 16)
    expected = kept_mass(model, TOKENS, LocalHeads(POLICY, jnp.ones((2, 4)), 2), phase=Phase.PREFILL)[0]
    np.testing.assert_allclose(found.mean(1), expected, rtol=1e-5)


@pytest.mark.slow
def test_layers_that_share_read_the_lists_of_the_layer_before():
    model = tiny_model()
    source = jnp.asarray([[0, 1, 2, 3], [3, 3, 0, 1]])
    own = shared_masks(model, TOKENS, POLICY, source, jnp.zeros(2, bool))
    plain, given = score_prompts(model, TOKENS, POLICY), score_prompts(model, TOKENS, Given(own, 16))
    np.testing.assert_allclose(given.nll, plain.nll, rtol=1e-5)
    shared = shared_masks(model, TOKENS, POLICY, source, jnp.asarray([False, True]))
    assert (shared[0] == own[0]).all() and (shared[1] == own[0][:, source[1]]).all()
    (likest,) = np.asarray(overlaps(shared))
    np.testing.assert_allclose(likest[np.arange(4), source[1]], 1)
    tokens = decode_masks(model, TOKENS, POLICY)
    assert tokens.shape == (2, 1, 2, 128, 8)
    assert (np.diagonal(np.asarray(tokens[..., ::16, :]), axis1=-2, axis2=-1)).all()  # a token's own block
