"""The command line: what it prints, what it returns, what it refuses, and whole runs on tiny models."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from safetensors.numpy import save_file

import seer_jax
from seer_jax import Generated, Transformer, from_pretrained, load_tokenizer, plan_memory, stream, tiny_lm
from seer_jax.commands import main as cli
from seer_jax.inference import memory
from seer_jax.commands.generate import GenerateConfig, kept_table
from seer_jax.selection.notation import parse_policy, write_policy
from seer_jax.convert import load_gates, save_base, save_gates
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import Oracle, Random, SCORERS, SinkWindow
from seer_jax.inference.sampling import Sample
from tests.seer_jax.conftest import LLAMA, tiny_model
from tests.seer_jax.test_text import TINY_LM

PROMPT = "def main():\n    # three birds: 🦜🦜🦜\n" * 4


pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with a tokenizer, prefill/ and decode/ gates; the context is that of the bundled tokenizer's vocabulary."""
    root = tmp_path_factory.mktemp("saved")
    model = tiny_model(dataclasses.replace(LLAMA, vocab_size=4096, eos_token_ids=(0,)))
    save_base(model, root / "base")
    shutil.copy(TINY_LM / "tokenizer.json", root / "base")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (root / "base" / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
    for kind, gate in (("prefill", model.prefill_gate), ("decode", model.decode_gate)):
        assert gate is not None
        save_gates(gate, root / kind, base_model="base")
    return root


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"\n  {name} " in text for name in ("demo", "convert", "verify", "train", "generate", "eval", "bench", "info")
    )
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"seer-jax {seer_jax.__version__}\n")


@pytest.mark.cpu  # on machines with a GPU, JAX's plugins for it take time as well
def test_help_comes_at_once():
    """Processor time, which other processes hardly change, and without what the commands need."""
    code = "import sys; from seer_jax.cli import main; main(['--help']); print([n for n in HEAVY if n in sys.modules])"
    heavy = ["transformers", "tokenizers", "orbax", "torch", "tyro", "jinja2", "seer_jax.train", "seer_jax.convert"]
    read, write = os.pipe()
    command = [sys.executable, "-c", code.replace("HEAVY", repr(heavy))]
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])
    os.close(write)
    with open(read) as output:
        text = output.read()
    _, status, usage = os.wait4(pid, 0)
    assert status == 0 and text.endswith("[]\n"), text
    assert usage.ru_utime + usage.ru_stime < 2.5


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: seer-jax {name}" in capsys.readouterr().out


USAGE = [
    (["generat"], "there is no command 'generat'; did you mean generate?"),
    (["xyz"], "expected one of demo, convert"),
    (["verify", "--base", "x"], "--reference"),
    (["generate", "--prefill", "topk:2"], r"the causal map to keep, in \(0, 1\]"),
    (["generate", "--decode", "sparse"], "A policy is written"),
    (["generate", "--decode", "topk:0.1,layers=2"], "no setting 'layers' of TopK"),
    (["generate", "--prompt", "x", "--prompt-file", "y"], "from prompt or from prompt_file; got both"),
    (["generate", "--system", "x"], "got system without chat"),
    (["generate", "--temperature", "-1"], r"temperature is 0.*got -1"),
    (["generate", "--top-k", "3"], "with temperature 0, which draws nothing"),
    (["generate", "--dtype", "int8"], "invalid choice 'int8'"),
    (["train", "--recipe", "both"], "invalid choice: 'both'"),
    (["train", "--recipe", "decode", "--config", "x.yaml"], "choose one"),
    (["train", "--steps", "0"], "steps is at least 1; got 0"),
    (["info", "--all"], "unrecognized arguments: --all"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_wrong_usage_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    # Boxes are drawn around messages, and lines broken.
    text = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert code == 2
    assert re.search(message, text), text


FAILURES = [
    (["generate", "--model", "/absent", "--prompt", "x"], "There is no folder '/absent'"),
    (["generate", "--prompt-file", "/absent", "--model", str(TINY_LM)], "No such file.*'/absent'"),
    (["generate", "--model", str(TINY_LM), "--prompt", ""], "at least one token; got an empty text"),
    (["generate", "--model", str(TINY_LM), "--prompt", "x", "--chat"], "needs a chat template"),
    (["generate", "--model", str(TINY_LM), "--prompt", "x", "--max-new-tokens", "0"], "at least 1; got 0"),
    (["generate", "--model", str(TINY_LM), "--prompt", "x", "--decode", "topk:0.5"], "has none of this kind"),
    (
        ["generate", "--model", str(TINY_LM), "--prompt", "x", "--decode", "budget:64:window,dense_layers=99"],
        "dense_layers must leave a sparse layer",
    ),
    (
        ["generate", "--model", str(TINY_LM), "--prompt", "x", "--report", "/absent/x"],
        "folder that is there; got /absent/x",
    ),
    (["train", "--config", "/absent.yaml"], "No such file"),
    (["train", "--output", "/absent/run"], "needs a base model"),
    (["train", "--model", str(TINY_LM)], "--output FOLDER; got none"),
    (["convert", "--gates", "/absent", "--output", "/also"], "There is no folder '/absent'"),
]


@pytest.mark.parametrize(("words", "message"), FAILURES, ids=[message for _, message in FAILURES])
def test_failures_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"seer-jax {words[0]}: ") and error.count("\n") == 1
    assert re.search(message, error), error
    with pytest.raises((ValueError, OSError), match=message):
        cli.main([*words, "--traceback"])


def test_defects_and_interruptions(monkeypatch: pytest.MonkeyPatch):
    def fail(error: BaseException):
        def run(words: list[str]) -> int:
            raise error

        return cli.Command("", run)

    monkeypatch.setitem(cli.COMMANDS, "info", fail(KeyboardInterrupt()))
    assert cli.main(["info"]) == 130
    monkeypatch.setitem(cli.COMMANDS, "info", fail(KeyError("a defect shows where it is")))
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m seer_jax.cli info | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("seer-jax") and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_info_tells_versions_devices_and_implementations(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"seer-jax {seer_jax.__version__}, Python 3.")
    assert any(line.split() == ["jax", jax.__version__] for line in lines)
    assert any(line.split()[:1] == [f"{jax.devices()[0].platform}:0"] for line in lines)
    attention = ("block_sparse_attention", "attention_with_block_scores", "sparse_decode_attention")
    for name in (*attention, "select_blocks", "pool_blocks", "score_blocks"):
        assert any(line.split()[:1] == [name] and "reference" in line for line in lines)


POLICIES = [
    ("dense", Dense()),
    ("threshold:0.0005", Threshold(5e-4)),
    ("threshold:0.0", Threshold(0.0)),
    ("mass:0.9", CumulativeMass(0.9)),
    ("mass:1.0:oracle", CumulativeMass(1.0, Oracle())),
    ("topk:0.1", TopK(0.1)),
    ("topk:0.1:oracle", TopK(0.1, Oracle())),
    ("budget:4096", TokenBudget(4096)),
    ("budget:4096:window", TokenBudget(4096, SinkWindow())),
    ("threshold:0.5:random", Threshold(0.5, Random())),
    ("topk:0.1,dense_layers=2", TopK(0.1, dense_layers=2)),
    ("mass:0.9,dense_last_rows=0", CumulativeMass(0.9, dense_last_rows=0)),
    ("budget:512:oracle,dense_layers=3", TokenBudget(512, Oracle(), dense_layers=3)),
    ("threshold:0.5,dense_layers=1,dense_last_rows=1", Threshold(0.5, dense_last_rows=1, dense_layers=1)),
]


@pytest.mark.parametrize(("text", "policy"), POLICIES, ids=[text for text, _ in POLICIES])
def test_policies_are_written_as_words(text: str, policy: Policy):
    assert parse_policy(text) == policy
    assert write_policy(policy) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dense",
        "dense:1",
        "threshold",
        "threshold:",
        "threshold:1",
        "mass:0",
        "mass:1.5",
        "topk:x",
        "budget:1.5",
        "budget:0",
        "topk:0.1:best",
        "topk:0.1,",
        "topk:0.1,dense_layers",
        "topk:0.1,dense_layers=-1",
        "topk:0.1,dense_layers=1.5",
        "topk:0.1, dense_layers=1",
    ],
)
def test_other_words_are_no_policies(text: str):
    with pytest.raises(ValueError, match=f"A policy is written dense.*got '{text}'"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sparse", "no rule 'sparse'"),
        ("dense,dense_layers=1", "dense stands alone"),
        ("topk:0.1,layers=1", "no setting 'layers' of TopK"),
        ("topk:0.1,density=1", "no setting 'density' of TopK"),
        ("budget:512,dense_last_rows=0", "no setting 'dense_last_rows' of TokenBudget"),
        ("mass:0.9,dense_layers=1,dense_layers=1", "dense_layers twice"),
        ("threshold:0.1,dense_last_rows=-1", "dense_last_rows is at least 0; got -1."),
    ],
)
def test_what_is_wrong_with_a_policy_is_told(text: str, reason: str):
    with pytest.raises(ValueError, match=re.escape(f"got {text!r} ({reason})")):
        parse_policy(text)


@hypothesis.given(
    kind=strategies.sampled_from([Threshold, CumulativeMass, TopK]),
    value=strategies.floats(0, 1, exclude_min=True, exclude_max=True),
    scorer=strategies.sampled_from(sorted(SCORERS)),
    counts=strategies.tuples(strategies.integers(0, 99), strategies.integers(0, 99)),
)
def test_policies_come_back_from_their_words(
    kind: type[Threshold | CumulativeMass | TopK], value: float, scorer: str, counts: tuple[int, int]
):
    rows, layers = counts
    for policy in (
        kind(value, SCORERS[scorer], dense_last_rows=rows, dense_layers=layers),
        TokenBudget(1 + rows, SCORERS[scorer], dense_layers=layers),
    ):
        assert parse_policy(write_policy(policy)) == policy


def streamed(model: Transformer, tokens: list[int], **arguments: Any) -> Generated:
    """What `generate` returns, by the programs that the command runs."""
    pieces = stream(model, [tokens], **arguments)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


@pytest.mark.cpu  # on a GPU two programs of the same model may differ in their last bits, and so in their choice of tokens
@pytest.mark.usefixtures("unchecked")  # the memory plan is made of shapes, which stand for arrays
def test_generate_writes_what_generate_returns(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base, gates = str(saved / "base"), [str(saved / "prefill"), str(saved / "decode")]
    tokenizer = load_tokenizer(base)
    model = from_pretrained(base, gates, dtype=jnp.float32)
    arguments: dict[str, Any] = dict(max_new_tokens=20, prefill=TopK(0.4), decode=TokenBudget(32))
    common = ["generate", "--model", base, "--gates", *gates, "--prefill", "topk:0.4", "--decode", "budget:32"]
    common += ["--max-new-tokens", "20"]

    expected = streamed(model, tokenizer.encode(PROMPT), **arguments)
    assert cli.main([*common, "--prompt", PROMPT]) == 0
    captured = capsys.readouterr()
    assert captured.out == tokenizer.decode(expected.rows()[0]) + "\n"
    assert f"{len(tokenizer.encode(PROMPT))} prompt tokens; 20 new in " in captured.err
    assert f"prefill {float(expected.prefill_kept.mean()):.1%}" in captured.err
    plan = plan_memory(model, 1, len(tokenizer.encode(PROMPT)), streamed=True, **arguments)
    assert captured.err.startswith(f"{plan}\n[") and captured.err.count("\n") == 7

    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert cli.main([*common, "--no-stats"]) == 0
    assert capsys.readouterr() == (captured.out, "")

    path = tmp_path / "report.json"
    assert cli.main([*common, "--prompt", PROMPT, "--no-stats", "--kept", "--report", str(path)]) == 0
    again = capsys.readouterr()
    assert again == (captured.out, kept_table(expected) + "\n")
    report = json.loads(path.read_text())
    assert report["tokens"] == expected.rows()[0] and report["text"] + "\n" == captured.out
    assert (report["prefill"], report["decode"]) == ("topk:0.4", "budget:32")
    assert report["memory_bytes"] == dataclasses.asdict(plan) | dict(total=plan.total)
    for name in ("prefill_kept", "decode_kept"):
        np.testing.assert_array_equal(np.float32(report[name]), getattr(expected, name)[:, 0])
    np.testing.assert_array_equal(np.float32(report["decode_kept_steps"]), expected.decode_kept_steps[:, :, 0])

    chat = tokenizer.encode(f"system: short\nuser: {PROMPT}\n")
    sampling = Sample(0.7, 50, 0.9)
    drawn = streamed(model, chat, max_new_tokens=20, sampling=sampling, key=jax.random.key(3))
    common[common.index("topk:0.4")] = common[common.index("budget:32")] = "dense"
    options = ["--chat", "--system", "short", "--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]
    assert cli.main([*common, "--prompt", PROMPT, *options]) == 0
    assert capsys.readouterr().out == tokenizer.decode(drawn.rows()[0]) + "\n"


def test_the_table_of_kept_blocks_is_of_the_steps_that_were_made():
    steps = np.zeros((3, 2, 2), np.float32)
    steps[:, :, 0] = [[0.5, 1], [0.25, 1], [0.75, 1]]
    steps[0, :, 1] = [0.5, 0.25]
    kept = jnp.asarray([[0.1, 0.2], [0.3, 0.4]])
    result = Generated(jnp.zeros((2, 4), jnp.int32), jnp.asarray([4, 2]), kept, jnp.asarray(steps))
    expected = ["layer prefill decode min .. max", "0 10.0% 50.0% 25.0% .. 75.0%", "1 30.0% 100.0% 100.0% .. 100.0%"]
    assert [" ".join(line.split()) for line in kept_table(result).splitlines()] == expected
    expected = ["layer prefill decode min .. max", "0 20.0% 50.0% 50.0% .. 50.0%", "1 40.0% 25.0% 25.0% .. 25.0%"]
    assert [" ".join(line.split()) for line in kept_table(result, row=1).splitlines()] == expected
    none = dataclasses.replace(result, lengths=jnp.asarray([1, 1]), decode_kept_steps=jnp.zeros((3, 2, 2)))
    assert kept_table(none).splitlines()[1].split() == ["0", "10.0%", "-"]


@pytest.mark.usefixtures("unchecked")
def test_a_plan_needs_no_weights(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Nor does it run anything: its table is all that is printed, and the same as with weights."""
    folders = [shutil.copytree(saved / name, tmp_path / name) for name in ("base", "prefill", "decode")]
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        path.unlink()
    words = ["generate", "--model", str(folders[0]), "--gates", *map(str, folders[1:]), "--prompt", PROMPT, "--plan"]
    assert cli.main([*words, "--decode", "budget:32", "--max-new-tokens", "20", "--dtype", "float32"]) == 0
    model = from_pretrained(saved / "base", [saved / "prefill", saved / "decode"], dtype=jnp.float32)
    length = len(load_tokenizer(saved / "base").encode(PROMPT))
    plan = plan_memory(model, 1, length, max_new_tokens=20, decode=TokenBudget(32), streamed=True)
    assert capsys.readouterr() == (f"{plan}\n", "")


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_the_device_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda device: memory.DeviceMemory(2**20, 0))
    words = ["generate", "--prompt", "import", "--max-new-tokens", "2", "--no-stats"]
    assert cli.main(words) == 1
    assert re.fullmatch(r"seer-jax generate: A generation fits .*fewer rows.*\n", capsys.readouterr().err)
    assert cli.main([*words, "--plan"]) == 0
    assert re.search(r"\navailable +0.001 GiB\nmissing +0.0\d\d GiB\n$", capsys.readouterr().out)


@pytest.mark.usefixtures("unchecked")
def test_the_bundled_model_has_a_name(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["generate", "--prompt", "import numpy as", "--max-new-tokens", "2", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith(" np")


def test_training_leaves_gates_that_can_be_used(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "text.txt"
    text.write_text(PROMPT * 20)
    size = dict(block_size=16, gate_dim=16)
    settings = dict(
        model=str(saved / "base"),
        output=str(tmp_path / "run"),
        gates="both",
        data=dict(paths=[str(text)]),
        prefill=size,
        decode=size,
        sequence_length=64,
        batch_size=2,
        steps=99,
        optimizer=dict(warmup_steps=0),
        precision="float32",
        tensorboard=False,
    )
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert cli.main(["train", "--config", str(tmp_path / "run.json"), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 2/2" in out and f"--gates {tmp_path}/run/prefill_gate {tmp_path}/run/decode_gate" in out
    config = from_pretrained(saved / "base").config
    for kind in ("prefill", "decode"):
        gate = load_gates(tmp_path / "run" / f"{kind}_gate", config)
        assert gate.config.block_size == 16 and gate.config.gate_dim == 16
        fresh = load_gates(saved / kind)
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(gate), jax.tree.leaves(fresh), strict=True))


def test_the_recipes_are_where_training_starts():
    default, rest = cli._train_defaults(["--steps", "7", "--recipe", "decode"])
    assert default.sequence_length == 32768 and default.gates.value == "decode" and rest == ["--steps", "7"]
    assert cli._train_defaults([])[0].sequence_length == 65536


def test_convert_and_verify(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gates = ["convert", "--gates", str(saved / "decode"), "--output", str(tmp_path / "pth"), "--format", "pth"]
    assert cli.main(gates) == 0
    assert capsys.readouterr().out == f"{tmp_path}/pth/attn_gate_weights.pth\n"
    again, before = load_gates(tmp_path / "pth"), load_gates(saved / "decode")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)

    model = from_pretrained(saved / "base", dtype=jnp.float32)
    ids = np.arange(20, dtype=np.int32)[None]
    logits = np.asarray(model(jnp.asarray(ids)))
    for name, factor, code in (("good", 1.0, 0), ("bad", 1.01, 1)):
        save_file(dict(input_ids=ids, logits=logits * np.float32(factor)), tmp_path / name)
        words = ["verify", "--base", str(saved / "base"), "--reference", str(tmp_path / name)]
        assert cli.main(words) == code
        assert ("PASS" if code == 0 else "FAIL") in capsys.readouterr().out
