"""Imports point one way and stay light."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.checkout import PROJECT, modules

KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels"}
COMES_WITH_JAX = {"jaxlib"}  # in the one version that fits
# These lead to the rest of the product, and only from inside functions.
MAY_LEAD_FURTHER = {"seer_jax.bench.training", "seer_jax.cli", "seer_jax.demo", "seer_jax.pretrained"}
HEAVY = ["torch", "tensorflow", "transformers", "orbax", "matplotlib", "datasets", "pyarrow", "tensorboardX"]


def imports(module: str, path: Path, *, module_level: bool) -> set[str]:
    """Returns the full names that a module imports, relative imports resolved.

    At module level are those that run when the module is imported: none in functions or for type checkers alone.
    """

    class Visitor(ast.NodeVisitor):
        def __init__(self):
            self.found = set()

        def visit_Import(self, node: ast.Import) -> None:
            self.found |= {alias.name for alias in node.names}

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            self.found |= {f"{base}.{alias.name}" for alias in node.names}

        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            if not module_level:
                self.generic_visit(node)

        def visit_If(self, node: ast.If) -> None:
            if not (module_level and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

    visitor = Visitor()
    visitor.visit(ast.parse(path.read_text()))
    return visitor.found


def below(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def breaches(module: str, path: Path) -> list[str]:
    """Returns the imports by which a module breaks the order pallas_kernels <- seer_jax <- {train, convert} <- cli."""
    anywhere, at_top = (imports(module, path, module_level=level) for level in (False, True))
    if below(module, "pallas_kernels"):
        allowed = KERNELS_MAY_IMPORT | sys.stdlib_module_names
        return [name for name in anywhere if name.split(".")[0] not in allowed]
    if below(module, "seer_jax.train"):
        return [name for name in anywhere if below(name, "seer_jax.convert") or below(name, "seer_jax.cli")]
    if below(module, "seer_jax.convert"):
        return [name for name in anywhere if below(name, "seer_jax.train") or below(name, "seer_jax.cli")]
    names = at_top if module in MAY_LEAD_FURTHER else anywhere
    return [name for name in names if below(name, "seer_jax.train") or below(name, "seer_jax.convert")]


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str):
    assert not breaches(module, modules()[module])


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("pallas_kernels.blocks", "import seer_jax"),
        ("pallas_kernels.blocks", "def f():\n    import flax"),
        ("seer_jax.train.loop", "from seer_jax import convert"),
        ("seer_jax.train.loop", "from ..convert import load_base"),
        ("seer_jax.convert.base", "import seer_jax.train.loop"),
        ("seer_jax.model", "def f():\n    from .train import loop"),
        ("seer_jax.cli", "from seer_jax import train"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, code: str):
    path = tmp_path / "module.py"
    path.write_text(code)
    assert breaches(module, path)


@pytest.mark.parametrize("module", ["pallas_kernels", "seer_jax", "seer_jax.cli"])
def test_heavy_packages_are_imported_when_needed(module: str):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def third_party() -> set[str]:
    """Returns the distributions that the packages import."""
    names = set().union(*(imports(*module, module_level=False) for module in modules().items()))
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    tops -= COMES_WITH_JAX | {"seer_jax", "pallas_kernels"}
    provided_by = importlib.metadata.packages_distributions()
    return {canonicalize_name(provided_by[top][0]) for top in tops if top in provided_by}


def declared(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_dependencies_are_what_is_imported():
    core = declared(PROJECT["project"]["dependencies"])
    extras = set().union(*(declared(lines) for lines in PROJECT["project"]["optional-dependencies"].values()))
    imported = third_party()
    assert imported <= core | extras, "imported, not declared"
    assert core <= imported, "declared, not imported"


def processor_seconds(code: str) -> float:
    """Returns the processor time of a fresh interpreter: unlike wall time, other processes hardly change it."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_import_time():
    ours, theirs = [], []
    for _ in range(2):
        theirs.append(processor_seconds("import jax, flax.nnx"))
        ours.append(processor_seconds("import seer_jax"))
    assert min(ours) <= 1.5 * min(theirs), f"{ours} {theirs}"
