"""The README's example runs, and its lists of files name what is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.packaging.checkout import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path):
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=quickly, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "the example leaves files behind"


def test_every_file_is_listed():
    """A listed folder stands for what is in it."""
    _, *sections = re.split(r"^\*\*`(\w+)/`\*\*", README, flags=re.MULTILINE)
    listed = {
        ROOT / folder / name
        for folder, rows in zip(sections[::2], sections[1::2], strict=True)
        for name in re.findall(r"^\| `(.+?)` \|", rows, re.MULTILINE)
    }
    folders = [ROOT / folder for folder in sections[::2]]
    files = {path for folder in folders for path in folder.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in listed if not path.exists()} == set(), "listed, not there"
    assert {path for path in files if not listed & {path, *path.parents}} == set(), "there, not listed"
