"""A checkout uses its own files, whichever one is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.checkout import PACKAGES, ROOT, modules

FIND = """
import importlib.util, json, sys
import seer_jax.train, seer_jax.convert
print(json.dumps({name: importlib.util.find_spec(name).origin for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout's packages."""
    path = tmp_path_factory.mktemp("second")
    shutil.copy(ROOT / "pyproject.toml", path)
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    return path


def test_two_checkouts_never_mix(second: Path):
    command = [sys.executable, "-c", FIND, *modules()]
    done = subprocess.run(command, cwd=second, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: str(second / path.relative_to(ROOT)) for name, path in modules().items()}
