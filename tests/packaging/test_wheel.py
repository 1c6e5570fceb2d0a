"""The wheel holds everything and works away from the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.packaging.checkout import PACKAGES, PROJECT, ROOT, modules

MIB = 2**20
TINY_LM = {
  "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "reference.json", "eval_text.txt",
  "words.json", "recipe/train_tiny_lm.py", "recipe/train_gates.py",
}  # fmt: skip


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing a former build left behind can get into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; its dependencies are borrowed from the environment of the tests."""
    path = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path)
    (site_packages,) = path.glob("lib/python*/site-packages")
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    # A path in a .pth file lends its packages, but its own .pth files, the editable installation's, are not read.
    (site_packages / "borrowed.pth").write_text("\n".join(paths))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        path / "bin/python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=path,
    )
    return path


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder, with files whose names our folders must not collide with."""
    (tmp_path / "train.py").write_text("mine = True")
    (tmp_path / "convert").mkdir()
    (tmp_path / "convert" / "__init__.py").write_text("mine = True")
    return tmp_path


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_wheel_holds_every_module_and_all_data(wheel: Path):
    suffixes = {name: "/__init__.py" if path.name == "__init__.py" else ".py" for name, path in modules().items()}
    expected = {name.replace(".", "/") + suffix for name, suffix in suffixes.items()}
    expected |= {"seer_jax/py.typed", "pallas_kernels/py.typed"}
    folders = "seer_jax/tiny_lm", "seer_jax/smollm2", "seer_jax/plots/viewer"
    data = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    expected |= {path.relative_to(ROOT).as_posix() for path in data if "__pycache__" not in path.parts}
    assert files(wheel) == expected


def test_every_folder_with_code_is_a_declared_package():
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert declared == found


def test_every_package_has_an_init():
    folders = {path.parent for path in modules().values()}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.slow
def test_tiny_lm_is_whole_and_small(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if i.filename.startswith("seer_jax/tiny_lm/")}
    assert {f"seer_jax/tiny_lm/{name}" for name in TINY_LM} <= set(sizes)
    gates = {name: size for name, size in sizes.items() if "/gates/" in name}
    assert sum(sizes.values()) - sum(gates.values()) <= 17 * MIB
    assert all(size <= 2 * MIB for size in gates.values())


@pytest.mark.slow
def test_gates_of_smollm2_are_small(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if i.filename.startswith("seer_jax/smollm2/")}
    assert "seer_jax/smollm2/README.md" in sizes
    assert all(size <= 8 * MIB for size in sizes.values())


@pytest.mark.slow
def test_command_runs_outside_the_checkout(environment: Path, elsewhere: Path):
    assert "demo" in run(environment / "bin/seer-jax", "--help", cwd=elsewhere)


@pytest.mark.slow
def test_every_module_imports_outside_the_checkout(environment: Path, elsewhere: Path):
    code = f"""
import importlib, importlib.resources, sys, train, convert
assert train.mine and convert.mine
for name in {sorted(modules())!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), module.__file__
print(importlib.resources.files("seer_jax").joinpath("tiny_lm/words.json").is_file())
"""
    assert run(environment / "bin/python", "-c", code, cwd=elsewhere).split() == ["True"]
