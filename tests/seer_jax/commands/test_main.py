"""The command line as a whole: help, exit codes, wrong usage, errors in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import seer_jax
from pallas_kernels.backends import Operation
from seer_jax import tiny_lm
from seer_jax.commands import info
from seer_jax.commands import main as cli
from seer_jax.selection.scorers import SCORERS

TINY_LM = str(tiny_lm.path())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "\n  demo      Distil gates for the bundled model" in text
    assert all(re.search(rf"\n  {name} +\w.*\w\n", text) for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"seer-jax {seer_jax.__version__}\n")


def test_every_command_is_a_module_of_its_own():
    folder = Path(cli.__file__).parent
    shared = {"__init__", "main", "arguments", "stages"}
    assert {path.stem for path in folder.glob("*.py")} == {*cli.COMMANDS, *shared}


@pytest.mark.cpu  # on machines with a GPU, JAX's plugins for it take time as well
def test_help_comes_at_once():
    """Processor time, which other processes hardly change, and without what the commands need."""
    code = (
        "import sys; from seer_jax.commands.main import main; main(['--help']); "
        "print([n for n in HEAVY if n in sys.modules])"
    )
    heavy = ["transformers", "tokenizers", "orbax", "torch", "tyro", "jinja2"]
    heavy += ["seer_jax.train", "seer_jax.convert", "seer_jax.evaluate", "seer_jax.bench"]
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


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_help_describes_the_scorers(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert all(f"  {scorer.name}: {scorer.meaning}" in text for scorer in SCORERS.values())


USAGE = [
    (["generat"], "there is no command 'generat'; did you mean generate?"),
    (["xyz"], "expected one of demo, convert"),
    (["verify", "--base", "x"], "--reference"),
    (["generate", "--prefill", "topk:2"], r"TopK.density, the share of the causal map +to keep, must lie in"),
    (["generate", "--decode", "sparse"], "A policy is written"),
    (["generate", "--decode", "topk:0.1,layers=2"], "no setting 'layers' of TopK"),
    (["generate", "--prompt", "x", "--prompt-file", "y"], "from prompt or from prompt_file; got both"),
    (["generate", "--system", "x"], "system must come with chat"),
    (["generate", "--temperature", "-1"], r"temperature must be 0.*got -1"),
    (["generate", "--top-k", "3"], "a temperature above 0; got temperature 0"),
    (["generate", "--dtype", "int8"], "invalid choice 'int8'"),
    (["generate", "--scorers"], "nrecognized"),
    (["eval", "--methods", "gate", "best"], "invalid choice 'best'"),
    (["eval", "--policies", "dense"], "policies must rank blocks"),
    (["train", "--recipe", "both"], "invalid choice: 'both'"),
    (["train", "--recipe", "decode", "--config", "x.yaml"], "choose one"),
    (["train", "--steps", "0"], "steps must be at least 1; got 0"),
    (["convert", "--gates", "x", "--output", "y", "--include-base"], "include_base must come with base"),
    (["bench", "prefil"], "invalid choice: 'prefil'"),
    (["info", "--all"], "unrecognized arguments: --all"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_wrong_usage_is_reported(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
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
    (["generate", "--prompt-file", "/absent", "--model", TINY_LM], "No such file.*'/absent'"),
    (["generate", "--model", TINY_LM, "--prompt", ""], "at least one token; got an empty text"),
    (["generate", "--model", TINY_LM, "--prompt", "x", "--chat"], "needs a chat template"),
    (["generate", "--model", TINY_LM, "--prompt", "x", "--max-new-tokens", "0"], "at least 1; got 0"),
    (["generate", "--model", TINY_LM, "--prompt", "x", "--decode", "topk:0.5"], "has none of this kind"),
    (
        ["generate", "--model", TINY_LM, "--prompt", "x", "--decode", "budget:64:window,dense_layers=99"],
        "dense_layers must leave a sparse layer",
    ),
    (
        ["generate", "--model", TINY_LM, "--prompt", "x", "--report", "/absent/x"],
        "folder of the report must exist; got /absent/x",
    ),
    (["generate", "--prompt", "x", "--scorers", "absent_module"], "No module named 'absent_module'"),
    (["eval", "--scorers", "/absent.py"], "a module or a Python file; got '/absent.py'"),
    (["train", "--config", "/absent.yaml"], "No such file"),
    (["train", "--output", "/absent/run"], "needs a base model"),
    (["train", "--model", TINY_LM], "output must be a folder.*got None"),
    (["convert", "--gates", "/absent", "--output", "/also"], "There is no folder '/absent'"),
]


@pytest.mark.parametrize(("words", "message"), FAILURES, ids=[message for _, message in FAILURES])
def test_failures_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"seer-jax {words[0]}: ") and error.count("\n") == 1
    assert re.search(message, error), error
    with pytest.raises((ValueError, OSError, ImportError), match=message):
        cli.main([*words, "--traceback"])


@pytest.mark.parametrize(
    ("error", "outcome"), [(KeyboardInterrupt(), 130), (KeyError("a defect shows its place"), None)]
)
def test_interruptions_and_defects(error: BaseException, outcome: int | None, monkeypatch: pytest.MonkeyPatch):
    def fail(words: list[str]) -> Any:
        raise error

    monkeypatch.setattr(info, "run", fail)
    if outcome is None:
        with pytest.raises(type(error)):
            cli.main(["info"])
    else:
        assert cli.main(["info"]) == outcome


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m seer_jax.commands.main info | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("seer-jax") and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_info_lists_versions_devices_and_implementations(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"seer-jax {seer_jax.__version__}, Python 3.")
    assert any(line.split() == ["jax", jax.__version__] for line in lines)
    assert any(line.split()[:1] == [f"{jax.devices()[0].platform}:0"] for line in lines)
    attention = ("block_sparse_attention", "attention_with_block_scores", "sparse_decode_attention")
    for name in (*attention, "select_blocks", "pool_blocks", "score_blocks", "stacked_linear"):
        assert any(line.split()[:1] == [name] and "reference" in line for line in lines), name


def test_info_finds_every_operation_once():
    found = list(info.operations())
    assert all(isinstance(operation, Operation) for operation in found)
    assert len({operation.name for operation in found}) == len(found) >= 7
