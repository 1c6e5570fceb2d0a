"""`seer-jax generate`: what it writes where, which policies run and why, plans and reports."""

import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import Generated, Transformer, from_pretrained, load_tokenizer, plan_memory, stream
from seer_jax.commands import generate as command
from seer_jax.commands import main as cli
from seer_jax.commands.generate import GenerateConfig, Job, generate, kept_table, recommended_sampling
from seer_jax.commands.text import prompts
from seer_jax.inference import memory
from seer_jax.inference.conversation.shared_prefix import Continued
from seer_jax.inference.sampling import Sample
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.selection.scorers import SinkWindow

PROMPT = "def main():\n    # three birds: 🦜🦜🦜\n" * 4


pytestmark = pytest.mark.usefixtures("compile_quickly")


IDLE = "decode: dense (the gate recommends nothing). To use the gate: --decode budget:4096\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], f"prefill: dense (no gate)\n{IDLE}"),
        (["--no-stats"], IDLE),
        (["--decode", "dense"], "prefill: dense (no gate)\ndecode: dense (named)\n"),
        (["--decode", "budget:64", "--no-stats"], ""),
    ],
)
def test_a_gate_that_is_loaded_and_not_used_is_told(
    words: list[str], said: str, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Job, "plan", lambda job, compiled: "the plan")
    names = ["--model", str(saved / "base"), "--gates", str(saved / "plain")]
    assert cli.main(["generate", *names, "--prompt", "x", "--plan", "--max-new-tokens", "2", *words]) == 0
    assert capsys.readouterr().err == said


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
    common = ["generate", "--model", base, "--gates", *gates, "--max-new-tokens", "20"]
    named = ["--prefill", "topk:0.4", "--decode", "budget:32"]

    expected = streamed(model, tokenizer.encode(PROMPT), **arguments)
    assert cli.main([*common, "--prompt", PROMPT]) == 0
    captured = capsys.readouterr()
    assert captured.out == tokenizer.decode(expected.rows()[0]) + "\n"
    count = len(tokenizer.encode(PROMPT))
    times = r"first after \d+\.\d\d s, then \d+\.\d tokens/s; \d+\.\d s to load, \d+\.\d s to compile; blocks"
    assert re.search(rf"\[{count} prompt tokens; 20 new, the {times}", captured.err)
    assert f"prefill {float(expected.prefill_kept.mean()):.1%}" in captured.err
    plan = plan_memory(model, 1, len(tokenizer.encode(PROMPT)), streamed=True, **arguments)
    policies = "prefill: topk:0.4 (recommended by the gate)\ndecode: budget:32 (recommended by the gate)\n"
    assert captured.err.startswith(f"{policies}Compiling ...\n[") and captured.err.count("\n") == 4

    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert cli.main([*common, *named, "--no-stats"]) == 0
    assert capsys.readouterr() == (captured.out, "")

    path = tmp_path / "report.json"
    assert cli.main([*common, *named, "--prompt", PROMPT, "--no-stats", "--kept", "--report", str(path)]) == 0
    again = capsys.readouterr()
    assert again == (captured.out, kept_table(expected) + "\n")
    report = json.loads(path.read_text())
    assert report["tokens"] == expected.rows()[0] and report["text"] + "\n" == captured.out
    assert (report["prefill"], report["decode"]) == ("topk:0.4", "budget:32")
    assert report["policy_reasons"] == dict(prefill="named", decode="named")
    assert report["memory_bytes"] == dataclasses.asdict(plan) | dict(total=plan.total)
    assert set(report["seconds"]) == {"load", "compile", "prefill", "decode"} and min(report["seconds"].values()) > 0
    assert report["tokens_per_second"] == pytest.approx(19 / report["seconds"]["decode"])
    assert report["failed_at"] is None
    for name in ("prefill_kept", "decode_kept"):
        np.testing.assert_array_equal(np.float32(report[name]), getattr(expected, name)[:, 0])
    np.testing.assert_array_equal(np.float32(report["decode_kept_steps"]), expected.decode_kept_steps[:, :, 0])

    chat = tokenizer.encode(f"system: short\nuser: {PROMPT}\n")
    sampling = Sample(0.7, 50, 0.9)
    dense: dict[str, Any] = dict(prefill=Dense(), decode=Dense())
    drawn = streamed(model, chat, max_new_tokens=20, sampling=sampling, key=jax.random.key(3), **dense)
    options = ["--prefill", "dense", "--decode", "dense"]
    options += ["--chat", "--system", "short", "--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]
    assert cli.main([*common, "--prompt", PROMPT, *options]) == 0
    assert capsys.readouterr().out == tokenizer.decode(drawn.rows()[0]) + "\n"


def test_the_table_of_kept_blocks_is_of_the_steps_that_were_made():
    steps = np.zeros((3, 2, 2), np.float32)
    steps[:, :, 0] = [[0.5, 1], [0.25, 1], [0.75, 1]]
    steps[0, :, 1] = [0.5, 0.25]
    kept = jnp.asarray([[0.1, 0.2], [0.3, 0.4]])
    result = Generated(jnp.zeros((2, 4), jnp.int32), jnp.asarray([4, 2]), kept, jnp.asarray(steps), jnp.full(2, -1))
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
    assert cli.main([*words, "--max-new-tokens", "20", "--dtype", "float32"]) == 0
    model = from_pretrained(saved / "base", [saved / "prefill", saved / "decode"], dtype=jnp.float32)
    length = len(load_tokenizer(saved / "base").encode(PROMPT))
    plan = plan_memory(model, 1, length, max_new_tokens=20, decode=TokenBudget(32), streamed=True)
    assert capsys.readouterr() == (
        f"{plan}\n",
        "prefill: topk:0.4 (recommended by the gate)\ndecode: budget:32 (recommended by the gate)\n",
    )


POLICIES = [
    ([], {}, "dense (no gate)", "dense (no gate)"),
    (["decode"], {}, "dense (no gate)", "budget:32 (recommended by the gate)"),
    (["prefill", "decode"], {}, "topk:0.4 (recommended by the gate)", "budget:32 (recommended by the gate)"),
    (["decode"], dict(decode=Dense()), "dense (no gate)", "dense (named)"),
    (["prefill"], dict(prefill=TopK(0.5)), "topk:0.5 (named)", "dense (no gate)"),
    ([], dict(decode=TokenBudget(64, SinkWindow())), "dense (no gate)", "budget:64:window (named)"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("gates", "options", "prefill", "decode"), POLICIES)
def test_the_policies_that_run_and_why(saved: Path, gates: list[str], options: dict, prefill: str, decode: str):
    model = from_pretrained(saved / "base", [saved / gate for gate in gates], abstract=True)
    job = Job.of(GenerateConfig(**options), model, [1])
    assert {phase: str(policy) for phase, policy in job.policies.items()} == dict(prefill=prefill, decode=decode)


@pytest.mark.usefixtures("unchecked")
def test_gates_that_recommend_nothing_run_densely(saved: Path):
    model = from_pretrained(saved / "base", saved / "prefill", abstract=True)
    assert model.prefill_gate is not None
    model.prefill_gate.recommended = None
    assert str(Job.of(GenerateConfig(), model, [1]).policies["prefill"]) == "dense (the gate recommends nothing)"


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_the_device_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "device_memory", lambda device: memory.DeviceMemory(2**20, 0))
    words = ["generate", "--prompt", "import", "--max-new-tokens", "2", "--no-stats"]
    assert cli.main(words) == 1
    assert re.fullmatch(
        r"seer-jax generate: The generation must fit .* available\. Lower --max-new-tokens, or shorten the prompt, or .*\n",
        capsys.readouterr().err,
    )
    assert cli.main([*words, "--plan"]) == 0
    assert re.search(r"\navailable +0.001 GiB\nmissing +0.0\d\d GiB\n$", capsys.readouterr().out)


@pytest.mark.usefixtures("unchecked")
def test_planned_memory_is_shown_where_it_is_much_of_what_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "device_memory", lambda device: memory.DeviceMemory(3 * 2**24, 0))
    assert cli.main(["generate", "--prompt", "import", "--max-new-tokens", "1"]) == 0
    assert re.search(
        r"\nCompiling \.\.\.\nweights +0.030 GiB\n(.*\n)+available +0.047 GiB\n\[", capsys.readouterr().err
    )


@pytest.mark.usefixtures("unchecked")
def test_a_text_that_fails_is_printed_up_to_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """And reported; the exit code tells."""

    def failing(*args: Any, **settings: Any) -> Generator[list[list[int]], None, Generated]:
        result = yield from stream(*args, **settings | dict(max_new_tokens=1))
        return dataclasses.replace(result, failed=jnp.asarray([1]))

    monkeypatch.setattr(command, "stream", failing)
    words = ["generate", "--prompt", "import numpy", "--max-new-tokens", "4", "--report", str(tmp_path / "report.json")]
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == " as\n"
    assert re.search(
        r"\nseer-jax generate: logits must be finite; those of new token 1 hold NaN .*--dtype float32\.\n$",
        captured.err,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["failed_at"], report["text"]) == (1, " as")


@pytest.mark.usefixtures("unchecked")
def test_the_bundled_model_has_a_name(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["generate", "--prompt", "import numpy as", "--max-new-tokens", "2", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith(" np")


def test_the_sampling_that_the_model_asks_for_is_told(tmp_path: Path):
    asked = dict(do_sample=True, temperature=0.6, top_p=0.95, repetition_penalty=1.05)
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    missing = "its generation_config.json asks for repetition_penalty=1.05, which is not available"
    advice = "the model recommends --temperature 0.6 --top-p 0.95; without them the most likely token is taken"
    assert recommended_sampling(GenerateConfig(), str(tmp_path)) == f"sampling: {advice}; {missing}"
    assert recommended_sampling(GenerateConfig(temperature=1.0), str(tmp_path)) == f"sampling: {missing}"
    assert recommended_sampling(GenerateConfig(), "tiny-lm") is None


def test_a_chat_also_ends_at_the_end_of_a_turn(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the model's files name the end of a text alone."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(saved / "base" / name, tmp_path)
    template = "{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Job, "plan", lambda job, compiled: seen.append(job.model.config.eos_token_ids))
    config = GenerateConfig(model=str(tmp_path), prompt="x", plan=True, stats=False)
    for chat in (False, True):
        generate(dataclasses.replace(config, chat=chat))
    assert seen == [(0,), (0, 1)]


@pytest.mark.slow
@pytest.mark.cpu
def test_prompts_of_a_file_are_continued_each_by_itself(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer, model = load_tokenizer(saved / "base"), from_pretrained(saved / "base", dtype=jnp.float32)
    texts = [PROMPT * 8 + end for end in ("a", "é")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (texts[0], dict(prompt=texts[1]))))
    words = ["generate", "--model", str(saved / "base"), "--max-new-tokens", "5", "--prompts", str(path)]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.out.splitlines())
    tokens = [tokenizer.encode(text) for text in texts]
    expected = [streamed(model, row, max_new_tokens=5).rows()[0] for row in tokens]
    assert [first["text"], second["text"]] == [tokenizer.decode(row) for row in expected]
    assert first["read_tokens"] == len(tokens[0]) and second["read_tokens"] <= 64
    read = first["read_tokens"] + second["read_tokens"]
    assert captured.err.endswith(f"[2 prompts, {sum(map(len, tokens))} tokens, of which {read} were read]\n")


def test_a_prompt_that_fails_is_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def continued(failed: int) -> Continued:
        kept = jnp.ones((2, 1))
        return Continued(Generated(jnp.ones((1, 2), int), jnp.array([1]), kept, kept[None], jnp.array([failed])), 3)

    monkeypatch.setattr(prompts, "generate_each", lambda *args, **settings: map(continued, (-1, 1)))
    (tmp_path / "prompts").write_text('"a"\n"b"')
    words = ["generate", "--model", str(saved / "base"), "--prompts", str(tmp_path / "prompts"), "--no-stats"]
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert [json.loads(line).get("failed_at") for line in captured.out.splitlines()] == [None, 1]
    assert re.fullmatch("seer-jax generate: prompt 2: logits must be finite; those of new token 1 .*\n", captured.err)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "prompts must hold at least one prompt; got none"),
        ('"a"\n{"text": "b"}', [], "prompts:2 must be a JSON text, or an object such as .*; got .*text"),
        ('"a"\n"\\ud83d"', [], "prompts:2: A text must be valid Unicode; got the lone surrogate"),
        ('"a"\n"' + 9000 * "b " + '"', [], r"prompts:2: Prompt and new tokens must fit the model's context of 8192"),
        ('"a"\n""', [], "prompts:2: a prompt must have at least one token; got an empty text"),
        ("a", [], "prompts:1, a line of prompts, must hold JSON"),
        ('"a"', ["--prefill", "topk:0.5:minference"], "looks at the whole prompt"),
        ('"a"', ["--max-new-tokens", "9999"], "must fit the model's context of 8192 tokens"),
        ('"a"', ["--plan", "--prompt", "x"], "--prompt and --plan must be left out with --prompts"),
    ],
)
def test_prompts_are_refused(
    text: str, options: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompts").write_text(text)
    words = ["generate", "--model", str(saved / "base"), "--prompts", str(tmp_path / "prompts"), *options]
    assert cli.main([*words, "--no-stats"]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert re.match(f"seer-jax generate: .*{message}", captured.err), captured.err


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "must have at least one token; got an empty text"), (b"ab\xff", "must be valid Unicode")],
)
def test_standard_input_may_be_closed_or_no_text(
    data: bytes | None, message: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert cli.main(["generate", "--model", str(saved / "base")]) == 1
    assert message in capsys.readouterr().err
