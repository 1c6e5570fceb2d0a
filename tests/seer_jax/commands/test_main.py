"""The command line as a whole: help, exit codes, wrong usage, errors in one line."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import seer_jax
from pallas_kernels.backends import Operation
from seer_jax.commands import info
from seer_jax.commands import main as cli
from seer_jax.commands.bench import BENCHES
from seer_jax.selection.scorers import SCORERS


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\n  demo +Distil gates for the bundled model", text)
    assert all(re.search(rf"\n  {name} +\w.*\w\n", text) for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"seer-jax {seer_jax.__version__}\n")


def test_every_command_is_a_module_or_package_of_its_own():
    folder = Path(cli.__file__).parent
    shared = {"__init__", "main", "arguments", "stages"}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")} & {*cli.COMMANDS}
    assert {path.stem for path in folder.glob("*.py")} | packages == {*cli.COMMANDS, *shared}


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


# Names that mean nothing to a reader of a command line: those of code in backticks, of classes and of members of enums.
INTERNAL = re.compile(r"`\S*`|\b[A-Z]\w+(?:Config|Settings|Options)\b|\b(?!HF_|XLA_|JAX_|SEER_)[A-Z]+_[A-Z_]+\b")


@pytest.mark.parametrize("name", [*cli.COMMANDS, *(f"bench {what}" for what in BENCHES)])
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """In a terminal of 80 characters, with examples on lines of their own."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: seer-jax {name}" in text
    assert [line for line in text.splitlines() if len(line) > 80 or re.search(r"seer-jax .*'\.\.\.' .", line)] == []
    assert INTERNAL.findall(" ".join(re.sub("[│╭╮╰╯─]", "", text).split())) == []


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_help_describes_the_scorers(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {scorer.name}: {scorer.meaning} " in text for scorer in SCORERS.values())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(KeyboardInterrupt(), 130), (signal.SIGTERM, 143), (KeyError("a defect shows its place"), None)],
)
def test_interruptions_and_defects(
    error: BaseException | signal.Signals,
    outcome: int | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(words: list[str]) -> Any:
        if isinstance(error, BaseException):
            raise error
        signal.raise_signal(error)

    monkeypatch.setattr(info, "run", fail)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            cli.main(["info"])
        return
    assert cli.main(["info"]) == outcome
    assert re.fullmatch(r"seer-jax info: (interrupted|terminated)\.", capsys.readouterr().err.strip())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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
    for name in (*attention, "select_blocks", "pool_blocks", "score_blocks", "score_sub_blocks", "stacked_linear"):
        assert any(line.split()[:1] == [name] and "reference" in line for line in lines), name


def test_info_finds_every_operation_once():
    found = list(info.operations())
    assert all(isinstance(operation, Operation) for operation in found)
    assert len({operation.name for operation in found}) == len(found) >= 8
