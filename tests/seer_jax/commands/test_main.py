"""The command line as a whole: help, exit codes, wrong usage, errors in one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

import seer_jax
from pallas_kernels.backends import Operation
from seer_jax.commands import info
from seer_jax.commands import main as cli
from seer_jax.commands.bench import BENCHES
from seer_jax.commands.errors import signals
from seer_jax.models.hub import GATES
from seer_jax.selection.scorers import SCORERS
from tests.packaging.checkout import ROOT


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
    heavy = ["jax", "transformers", "tokenizers", "orbax", "torch", "tyro", "jinja2"]
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
    """In a terminal of 80 characters, with examples on lines of their own and a text for every option."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: seer-jax {name}" in text
    assert [line for line in text.splitlines() if len(line) > 80 or re.search(r"seer-jax .*'\.\.\.' .", line)] == []
    plain = re.sub("[│╭╮╰╯─]", "", text)
    assert INTERNAL.findall(" ".join(plain.split())) == []
    assert re.findall(r"^ *(--\S+)(?: \S+)*\s{2,}\(default: ", plain, re.MULTILINE) == []


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_help_describes_the_scorers(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {scorer.name}: {scorer.meaning} " in text for scorer in SCORERS.values())


def test_help_offers_baselines_that_need_no_gate(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--help"])
    offered = re.search(r"--baseline \{([^}]*)\}", re.sub("[│ \n]+", " ", capsys.readouterr().out).replace(", ", ","))
    assert offered is not None and "gate" not in offered[1].split(",") and "xattention" in offered[1].split(",")


# Each signal with the exit code and the word of a command that it stops.
SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
@pytest.mark.parametrize("note", ["", "2 of 4 scores are kept."])
@pytest.mark.parametrize("is_lost", [False, True])
def test_interruptions(
    number: signal.Signals,
    code: int,
    word: str,
    note: str,
    is_lost: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """One line, with what the command keeps, also where code of others loses the exception."""

    class Lost:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def stopped(words: list[str]) -> Any:
        try:
            if is_lost:
                Lost()
                time.sleep(30)
            signal.raise_signal(number)
        except KeyboardInterrupt as stop:
            if note:
                stop.add_note(note)
            raise

    monkeypatch.setattr(info, "run", stopped)
    monkeypatch.setattr(signals, "AGAIN", 0.1)
    handlers = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err == f"seer-jax info: {word}.{f' {note}' if note else ''}\n"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    signal.signal(signal.SIGINT, handlers[0])
    assert signal.getsignal(signal.SIGTERM) == handlers[1]


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
@pytest.mark.parametrize("words", ["generate --prompt x", "train", "--scorers scorers.py info"])
def test_interruptions_in_the_first_second(number: signal.Signals, code: int, word: str, words: str, tmp_path: Path):
    """While JAX is imported, which a module of that name stands for here."""
    (tmp_path / "jax.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    # A process in the background would ignore SIGINT, and so would its children.
    code_of_child = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from seer_jax.commands.main import main; sys.exit(main())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code_of_child, *words.split()],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "importing\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    name = next(word for word in words.split() if word in cli.COMMANDS)
    assert (child.returncode, said) == (code, f"seer-jax {name}: {word}.\n")


# A command that is stopped while a computation of minutes runs.
COMPUTES = """
import sys
from seer_jax.commands import main as cli

def computes(words, scorers, all_imported):
    import jax, jax.numpy as jnp
    all_imported()
    x = jnp.ones((1000, 1000))
    jax.jit(lambda x: jax.lax.fori_loop(0, 10**6, lambda i, x: jnp.tanh(x @ x), x))(x)
    print("computes")  # in the buffer of a pipe
    raise KeyboardInterrupt

cli._dispatch = computes
sys.exit(cli.main())
"""


def test_an_interruption_waits_for_no_computation():
    command = [sys.executable, "-c", COMPUTES, "info"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "computes\n", "seer-jax info: interrupted.\n")


def test_a_defect_shows_its_place(monkeypatch: pytest.MonkeyPatch):
    def fail(words: list[str]) -> Any:
        raise KeyError("a defect shows its place")

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(KeyError):
        cli.main(["info"])


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
    assert lines[-len(GATES) - 1] == "Gates by name"
    for name, line in zip(GATES, lines[-len(GATES) :], strict=True):
        assert re.fullmatch(rf"  {name} +prefill: gate_dim=64.*; decode: gate_dim=64.*", line)


def test_info_finds_every_operation_once():
    found = list(info.operations())
    assert all(isinstance(operation, Operation) for operation in found)
    assert len({operation.name for operation in found}) == len(found) >= 8
