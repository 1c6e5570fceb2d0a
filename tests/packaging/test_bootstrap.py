"""The Makefile's search for a Python that can run seer-jax."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.checkout import ROOT

FIND = ROOT / ".ci" / "find-python"
REAL = getattr(sys, "_base_executable", sys.executable)
WORKS = f'#!/bin/sh\nexec "{REAL}" "$@"\n'
SHIM_OF_ABSENT_VERSION = "#!/bin/sh\necho 'pyenv: python3: command not found' >&2\nexit 127\n"
OLD = "#!/bin/sh\necho 'is Python 3.11' >&2\nexit 1\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """An empty home and a bin folder without any Python."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def put(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def find(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine)}
    return subprocess.run([FIND, *arguments], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3",
        "bin/python3.12",
        "bin/python3.13",
        ".pyenv/versions/3.12.1/bin/python",
        ".local/share/uv/python/cpython-3.12.11-linux-x86_64-gnu/bin/python3",
    ],
)
@pytest.mark.parametrize("first", [None, SHIM_OF_ABSENT_VERSION, OLD])
def test_python_is_found(machine: Path, place: str, first: str | None):
    if first is not None:
        put(machine / "bin" / "python3", first)
    put(machine / place, WORKS)
    done = find(machine)
    assert (done.returncode, done.stdout.strip()) == (0, REAL), done.stderr


def test_uv_is_asked(machine: Path):
    put(machine / "opt" / "python", WORKS)
    put(machine / "bin" / "uv", f"#!/bin/sh\necho {machine}/opt/python\n")
    assert find(machine).stdout.strip() == REAL


def test_none_found_says_what_was_tried_and_what_to_install(machine: Path):
    put(machine / "bin" / "python3", OLD)
    done = find(machine)
    assert done.returncode == 1 and done.stdout == ""
    assert "python3: is Python 3.11" in done.stderr and "apt install python3.12" in done.stderr


def test_named_python_is_used_alone(machine: Path):
    put(machine / "bin" / "python3", OLD)
    put(machine / "mine" / "python", WORKS)
    assert find(machine, str(machine / "mine" / "python")).stdout.strip() == REAL
    put(machine / "bin" / "python3.12", WORKS)
    done = find(machine, "python3")
    assert done.returncode == 1 and "PYTHON=python3 does not work here" in done.stderr


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 14), (3, 15), (4, 0)])
def test_version_is_read_from_the_interpreter(machine: Path, version: tuple[int, int]):
    put(machine / "bin" / "python3", f'#!/bin/sh\nexec "{REAL}" -c "import sys; sys.version_info = {version}\n$2"\n')
    done = find(machine, "python3")
    accepted = version in [(3, 12), (3, 14)]
    assert (done.returncode == 0) == accepted, done.stderr
