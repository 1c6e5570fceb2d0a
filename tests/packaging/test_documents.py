"""What README, docs/ and the folders' READMEs tell readers to type works, and what they link to is there."""

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

import seer_jax
from seer_jax.commands.main import COMMANDS, main
from tests.packaging.checkout import PROJECT, ROOT, modules

FOUND = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")}
DOCUMENTS = sorted(path for path in FOUND if not path.relative_to(ROOT).parts[0].startswith("."))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
PROGRAM = "seer-jax "


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The command lines of a document: those of its code blocks, comments cut off, and those within its sentences."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}.*$", text, re.MULTILINE)
    blocks = re.sub(r"\\\n\s*", " ", "\n".join([*fenced, *indented])).splitlines()
    found = [line.strip().removeprefix("$ ") for line in blocks] + re.findall(r"`([^`\n]+)`", text)
    return list(dict.fromkeys(shlex.join(shlex.split(x, comments=True)) for x in found if x.startswith(PROGRAM)))


LINES = [(name, line) for name in NAMES for line in commands(text_of(name))]


class Parsed(BaseException):
    """Raised in place of the work of a command."""


@pytest.fixture
def parse_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a command when its options are read."""
    cli = tyro.cli

    def parse(*arguments: Any, **settings: Any) -> None:
        cli(*arguments, **settings)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse)


def parses(line: str) -> bool:
    """Whether the program takes a command line. One word after the program's name may be just the name of a command."""
    name, *rest = shlex.split(line)[1:]
    if not rest and name in COMMANDS:
        return True
    try:
        return main([COMMANDS[0] if name == "COMMAND" else name, *rest]) == 0
    except Parsed:
        return True
    except SystemExit as error:
        return error.code == 0


@pytest.mark.usefixtures("parse_alone")
@pytest.mark.parametrize(("name", "line"), LINES)
def test_command_lines_are_understood(name: str, line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        understood = parses(line)
    assert understood, said.getvalue()


@pytest.mark.usefixtures("parse_alone")
@pytest.mark.parametrize(
    "line", ["seer-jax eval --polices dense", "seer-jax dema", "seer-jax generate --decode best:3"]
)
def test_a_wrong_command_line_is_found(line: str):
    assert not parses(line)


QUICK = [line for _, line in LINES if line.startswith((f"{PROGRAM}info", f"{PROGRAM}verify --", f"{PROGRAM}COMMAND"))]


@pytest.mark.parametrize("line", dict.fromkeys(QUICK))
def test_quick_command_lines_run(line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    try:
        assert main(shlex.split(line.replace("COMMAND", COMMANDS[0]))[1:]) == 0
    except SystemExit as error:
        assert error.code == 0


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_there(name: str):
    """From the top of the checkout, or somewhere in the document's own folder."""
    scripts = re.findall(r"python (\S+\.py)", text_of(name))
    assert [x for x in scripts if not ((ROOT / x).is_file() or any((ROOT / name).parent.rglob(x)))] == []


def test_every_command_is_shown():
    assert {line.split()[1] for _, line in LINES} >= set(COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text_of(name), re.MULTILINE)) <= targets


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text_of(name))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_paragraphs_are_whole(name: str):
    """Rows of a table follow each other, and paragraphs begin where sentences do: what a merge that put a line elsewhere breaks."""
    text = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    blocks = [block.splitlines() for block in re.split(r"\n(?:[ \t]*\n)+", text) if block.strip()]
    assert [block[0] for block in blocks if len({line.startswith("|") for line in block}) > 1] == []
    # A sentence may go on after an example.
    after_prose = [block[0] for before, block in itertools.pairwise(blocks) if not before[0].startswith("    ")]
    assert [first for first in after_prose if re.match("[a-z]+ [a-z]", first)] == []


def test_every_module_is_listed():
    """The files in docs/architecture.md are those that are there; a listed folder stands for its files where none of them is listed."""
    _, *sections = re.split(r"^\*\*`(\w+)/`\*\*", text_of("docs/architecture.md"), flags=re.MULTILINE)
    listed = {
        Path(folder, name)
        for folder, rows in zip(sections[::2], sections[1::2], strict=True)
        for name in re.findall(r"^\| \**`([^`]+)`", rows, re.MULTILINE)
    }
    assert {str(path) for path in listed if not (ROOT / path).exists()} == set(), "listed, not there"
    spelled_out = {path.parent for path in listed if path.suffix}
    files = [path.relative_to(ROOT) for path in modules().values() if path.name != "__init__.py"]
    unlisted = [path for path in files if path not in listed]
    missing = [str(path) for path in unlisted if path.parent in spelled_out or not listed & {*path.parents}]
    assert missing == [], "there, not listed"


def test_versions_agree():
    versions = {PROJECT["project"]["version"], seer_jax.__version__}
    versions |= set(re.findall(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE))
    assert len(versions) == 1, versions


# Those of the folders' READMEs take models from the hub.
def examples(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


WITH_PYTHON = [name for name in NAMES if examples(name) and name.startswith(("README", "docs/"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_examples_run(name: str, tmp_path: Path):
    """One after the other, as a reader would type them; README's leave no file behind. Its second one trains."""
    run_examples(name, slice(None), tmp_path)
    assert name != "README.md" or not list(tmp_path.iterdir()), "the examples leave files behind"


@pytest.mark.slow
def test_fine_tuning_runs_as_documented(tmp_path: Path):
    run_examples("train/README.md", slice(1, None), tmp_path)
    assert (tmp_path / "finetuned" / "model.safetensors").is_file()


def run_examples(name: str, which: slice, tmp_path: Path) -> None:
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", "\n".join(examples(name)[which])]
    done = subprocess.run(command, cwd=tmp_path, env=quickly, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
