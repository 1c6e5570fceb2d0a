"""`seer-jax calibrate`: a whole run on a tiny model, what it leaves, and that other commands use it."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seer_jax.calibrate import Calibration, HeldOut, Quantity, Report, Target
from seer_jax.commands import calibrate as calibrate_command
from seer_jax.commands import main as cli
from seer_jax.commands.calibrate import CalibrateConfig
from seer_jax.convert import load_gates
from seer_jax.evaluate import Phase, parse_level
from seer_jax.selection.notation import parse_policy, write_policy_file
from seer_jax.selection.rules import Threshold, TopK
from seer_jax.selection.scorers import Oracle, Scorer

pytestmark = pytest.mark.usefixtures("compile_quickly", "unchecked")

SMALL = ["--length", "64", "--windows", "1", "--held-out-windows", "2", "--rule", "threshold", "--density", "0.7"]


@pytest.fixture
def words(saved: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("def main(argv):\n    return argv[1:]\n" * 120)
    return ["calibrate", "--model", str(saved / "base"), "--text", str(tmp_path / "text.txt"), *SMALL]


def found(
    model: Any, windows: np.ndarray, target: Target, *, phase: Phase, scorer: Scorer, **others: Any
) -> Calibration:
    """In place of `calibrate`."""
    heads = model.config.num_heads if phase is Phase.PREFILL else model.config.num_kv_heads
    policy = Threshold(np.full((2, heads), 0.1, np.float32), scorer, dense_last_rows=0)
    rivals = {"one threshold": Threshold(0.1, scorer), "top-k": TopK(0.4, scorer)}
    return Calibration(phase, target, policy, 0.7, 0.9, 0.01, windows.shape[1], rivals)


def report_of(model: Any, windows: np.ndarray, made: Calibration, *, progress: Any) -> Report:
    """In place of `held_out_report`."""
    policies = {"calibrated": made.policy, **made.rivals}
    return Report(made, 18.3, tuple(HeldOut(title, policy, 0.7, 0.9, (0.1, 0.2)) for title, policy in policies.items()))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["saved", "whole"])
def is_whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the models are run, which takes long to compile, or only what is made of their results."""
    if not request.param:
        monkeypatch.setattr(calibrate_command, "calibrate", found)
        monkeypatch.setattr(calibrate_command, "held_out_report", report_of)
    return request.param


def test_calibrated_gates_are_used_by_default(
    words: list[str], saved: Path, tmp_path: Path, is_whole: bool, capsys: pytest.CaptureFixture[str]
):
    output, source = tmp_path / "out", saved / "prefill"
    words = [*words, "--gates", str(source), "--output", str(output)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    rows = "dense, perplexity ", "calibrated, threshold ", "one threshold, 0.", "top-k, 0."
    assert all(f"\n{row}" in said for row in rows)
    gate = load_gates(output / "prefill_gate")
    assert isinstance(gate.recommended, Threshold) and gate.recommended.dense_last_rows == 2
    assert np.shape(gate.recommended.threshold) == (2, 4)
    name = "attn_gate_weights.safetensors"
    assert (output / "prefill_gate" / name).read_bytes() == (source / name).read_bytes()
    saved_config = json.loads((output / "prefill_gate" / "config.json").read_text())
    assert saved_config["seer_jax_calibration"]["length"] == 64 and saved_config["base_model"] == "base"
    report = json.loads((output / "calibration.json").read_text())
    assert [row["title"] for row in report["prefill"]["held_out"]] == ["calibrated", "one threshold", "top-k"]
    where, use = said.splitlines()[-2:]
    assert where == f"Gates: {output / 'prefill_gate'}; report: {output / 'calibration.json'}"
    told = f"generate --model {saved / 'base'} --gates {output / 'prefill_gate'} --prompt ..."
    assert use == f"Use them at about 64 tokens, the length that they were calibrated at: seer-jax {told}"
    if is_whole:
        shown = r"[+-]\S+% \([+-]\S+% to [+-]\S+%\)"
        assert re.search(rf"\nHeld-out text, prefill: 3/3  top-k: \S+% of the blocks, {shown} over dense\n", said)
        assert cli.main([*shlex.split(told), "--max-new-tokens", "1"]) == 0
        assert "threshold:[2 x 4]" in capsys.readouterr().err
    assert cli.main(words) == 1
    assert "--output must not hold what is to be written; " in capsys.readouterr().err


def test_a_phase_that_is_finished_is_saved(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def prefill_alone(*arguments: Any, phase: Phase, **others: Any) -> Calibration:
        if phase is Phase.DECODE:
            raise ValueError("density must be at least 0.5; got 0.3. Raise it.")
        return found(*arguments, phase=phase, **others)

    monkeypatch.setattr(calibrate_command, "calibrate", prefill_alone)
    monkeypatch.setattr(calibrate_command, "held_out_report", report_of)
    file = tmp_path / "out" / "prefill.json"
    assert cli.main([*words, "--length", "256", "--baseline", "oracle", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert f"\nPolicies: {file}; " in said.out and said.err == (
        "seer-jax calibrate: --density must be at least 0.5; got 0.3. Raise it.\n"
    )
    assert isinstance(parse_policy(str(file)), Threshold) and not file.with_name("decode.json").exists()


def test_text_is_not_held_out_of_itself(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = words[words.index("--text") + 1]
    assert cli.main([*words, "--length", "256", "--baseline", "oracle", "--held-out", text]) == 1
    assert "--held-out must be another file than --text; got " in capsys.readouterr().err


def test_a_baseline_becomes_a_policy_file(
    words: list[str], saved: Path, tmp_path: Path, is_whole: bool, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    file = output / "decode.json"
    words = [*words, "--length", "256", "--density", "0.8", "--baseline", "oracle", "--phases", "decode"]
    assert cli.main([*words, "--output", str(output)]) == 0
    policy = parse_policy(str(file))
    assert isinstance(policy, Threshold) and policy.scorer == Oracle() and np.shape(policy.threshold) == (2, 2)
    assert parse_level(str(file)).methods == (Oracle(),)
    where, use = capsys.readouterr().out.splitlines()[-2:]
    told = f"generate --model {saved / 'base'} --decode {file} --prompt ..."
    assert where.startswith(f"Policies: {file}; ") and use.endswith(f": seer-jax {told}")
    if is_whole:
        assert cli.main([*shlex.split(told), "--max-new-tokens", "2"]) == 0
    else:
        assert cli.main(words) == 0
        assert "\nNothing was saved: pass --output FOLDER to keep what was chosen.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must hold JSON"),
        ("[]", "must hold a policy, .* calibrate again"),
        ("{}", "it has no 'policy'. Write the policy as text"),
    ],
)
def test_a_file_that_holds_no_policy(text: str, message: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_policy(str(tmp_path / "x.json"))


def test_policy_files_keep_policies(tmp_path: Path):
    policy = Threshold(np.array([[0.25, 0.5]], np.float32), Oracle(), dense_last_rows=0)
    write_policy_file(tmp_path / "x.json", policy, calibration={"length": 64})
    again = parse_policy(str(tmp_path / "x.json"))
    assert str(again) == str(policy) and isinstance(again, Threshold)
    np.testing.assert_array_equal(np.asarray(again.threshold), policy.threshold)


def test_the_target_is_one():
    assert CalibrateConfig(gates=("x",)).target == Target(Quantity.OVER, 0.01)
    assert CalibrateConfig(gates=("x",), kept_mass=0.9, phases=(Phase.DECODE,)).target == Target(
        Quantity.KEPT_MASS, 0.9
    )
