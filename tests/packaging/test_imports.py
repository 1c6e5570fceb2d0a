"""Imports point one way, make no circle and stay light; folders stay small."""

import importlib.metadata
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.checkout import PROJECT, ROOT, modules
from tests.packaging.imports import below, circle, graph, imports

# A module may import from its own package and from those before it.
ORDER = ["pallas_kernels", "seer_jax", "seer_jax.convert", "seer_jax.train", "seer_jax.commands"]
# These lead to the packages after the library's own, and only from inside functions: loading a model reads its files; the benchmark of
# training, the study of gates and the extension of contexts train.
MAY_LEAD_FURTHER = {
    "seer_jax.models.pretrained": "seer_jax.convert",
    "seer_jax.bench.training": "seer_jax.train",
    "seer_jax.smollm2.extension.training": "seer_jax.train",
    "seer_jax.smollm2.study.training": "seer_jax.train",
}
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels"}
COMES_WITH_JAX = {"jaxlib", "ml_dtypes"}  # in the one version that fits
FOR_TESTS = ["unittest", "pytest", "hypothesis", "tests"]
HEAVY = ["torch", "tensorflow", "transformers", "orbax", "matplotlib", "datasets", "pyarrow", "tensorboardX", "tyro"]
GOLDENS = ROOT / "tests/golden/make_transformers_goldens.py"  # runs in an environment of its own
HELP = "from seer_jax.commands.main import main; main(['--help'])"
MOST_FILES = 12


def package(name: str) -> str | None:
    """The package of `ORDER` that a module belongs to."""
    return next((p for p in reversed(ORDER) if below(name, p)), None)


def breaches(module: str, path: Path) -> list[str]:
    """The imports by which a module breaks the order, or by which a kernel's module needs more than JAX."""
    names, at_top = imports(module, path), imports(module, path, in_functions=False)
    own = package(module)
    assert own is not None
    later = ORDER[ORDER.index(own) + 1 :]
    found = [name for name in names if package(name) in later]
    if (allowed := MAY_LEAD_FURTHER.get(module)) is not None:
        found = [name for name in found if name in at_top or not below(name, allowed)]
    if own == "pallas_kernels":
        found += [n for n in names if n.split(".")[0] not in KERNELS_MAY_IMPORT | sys.stdlib_module_names]
    return found + [name for name in names if any(below(name, other) for other in FOR_TESTS)]


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str):
    assert not breaches(module, modules()[module])


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("pallas_kernels.blocks", "import seer_jax"),
        ("pallas_kernels.blocks", "def f():\n    import flax"),
        ("seer_jax.convert.base", "import seer_jax.train.loop"),
        ("seer_jax.convert.base", "from ..commands import main"),
        ("seer_jax.train.loop", "def f():\n    from seer_jax.commands import main"),
        ("seer_jax.models.decoder", "def f():\n    from ..train import loop"),
        ("seer_jax.models.decoder", "from seer_jax import convert"),
        ("seer_jax.models.pretrained", "from seer_jax.convert import load_base"),
        ("seer_jax.models.pretrained", "def f():\n    from seer_jax.train import distill"),
        ("seer_jax.bench.prefill", "import seer_jax.commands.bench"),
        ("seer_jax.bench.prefill", "def f():\n    from unittest import mock"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, code: str):
    path = tmp_path / "module.py"
    path.write_text(code)
    assert breaches(module, path)


def test_exceptions_are_needed():
    for module, allowed in MAY_LEAD_FURTHER.items():
        assert any(below(name, allowed) for name in imports(module, modules()[module])), module


def test_no_module_needs_itself():
    assert not circle(graph(modules()))


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (dict(a="import b", b="import c", c="def f():\n    from a import x"), ["a", "b", "c", "a"]),
        (dict(a="import b.c", b="import a"), ["a", "b", "a"]),
        (dict(a="import b", b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"), []),
        (dict(a="import b, c", b="import c", c="import numpy"), []),
    ],
)
def test_a_circle_is_found(tmp_path: Path, sources: dict[str, str], expected: list[str]):
    files = {name: tmp_path / f"{name}.py" for name in sources}
    for name, source in sources.items():
        files[name].write_text(source)
    assert circle(graph(files | ({"b.c": files["a"]} if "b.c" in sources["a"] else {}))) == expected


def test_folders_stay_small():
    """A reader sees a folder whole."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    if not files:
        pytest.skip("not a git checkout")
    counts = Counter(path.parent for path in files)
    assert {str(folder): n for folder, n in counts.items() if n > MOST_FILES} == {}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("imported", ["import pallas_kernels", "import seer_jax", HELP])
def test_heavy_packages_are_imported_when_needed(imported: str):
    code = f"{imported}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == "[]"


def test_public_names_are_imported_when_they_are_used():
    code = """
import sys, seer_jax
early = "jax" in sys.modules
missing = [name for name in seer_jax.__all__ if not hasattr(seer_jax, name)]
print(early, missing, {*seer_jax.__all__} - {*seer_jax._homes()}, seer_jax.selection.scorers.__name__, hasattr(seer_jax, "absent"))
"""
    assert python(code) == "False [] {'__version__'} seer_jax.selection.scorers False"


def third_party(files: dict[str, Path]) -> set[str]:
    """The distributions that modules import."""
    names = set().union(*(imports(*module) for module in files.items()))
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    tops -= COMES_WITH_JAX | {"seer_jax", "pallas_kernels", "tests"}
    provided_by = importlib.metadata.packages_distributions()
    return {canonicalize_name(provided_by[top][0]) for top in tops if top in provided_by}


def declared(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_dependencies_are_what_is_imported():
    core = declared(PROJECT["project"]["dependencies"])
    extras = set().union(*(declared(lines) for lines in PROJECT["project"]["optional-dependencies"].values()))
    imported = third_party(modules())
    assert imported <= core | extras, "imported, not declared"
    assert core <= imported, "declared, not imported"
    files = [ROOT / "conftest.py", *(ROOT / "tests").rglob("*.py")]
    for_tests = third_party({str(path): path for path in files if path != GOLDENS})
    assert for_tests <= core | extras, "imported by tests, not declared"


def processor_seconds(code: str) -> float:
    """The processor time of a fresh interpreter: unlike wall time, other processes hardly change it."""
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ, file_actions=silent)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_import_time():
    """Of the package, and of the command line's help."""
    ours, help_text, theirs = [], [], []
    for _ in range(2):
        theirs.append(processor_seconds("import jax, flax.nnx"))
        ours.append(processor_seconds("import seer_jax"))
        help_text.append(processor_seconds(HELP))
    assert max(min(ours), min(help_text)) <= 1.5 * min(theirs), f"{ours} {help_text} {theirs}"
