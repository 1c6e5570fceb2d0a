"""What each module imports, read from its source, and the graph that the imports make."""

import ast
from pathlib import Path

Graph = dict[str, set[str]]


def imports(module: str, path: Path, *, in_functions: bool = True, for_checkers: bool = True) -> set[str]:
    """The full names that a module imports, relative imports resolved.

    Args:
      module, path: its name and file.
      in_functions: those inside functions too, which run when they are called.
      for_checkers: those under TYPE_CHECKING too, which never run.
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{_base(node, module, path)}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not in_functions:
            continue
        elif not for_checkers and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def _base(node: ast.ImportFrom, module: str, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def below(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def graph(modules: dict[str, Path]) -> Graph:
    """Each module's imports among the modules, those inside functions too.

    An import also runs the packages around the imported module; those around the importing one are running already.
    """
    edges: Graph = {}
    for module, path in modules.items():
        edges[module] = set()
        for name in imports(module, path, for_checkers=False):
            target = name
            while target and target not in modules:
                target = target.rpartition(".")[0]
            while target:
                if not below(module, target):
                    edges[module].add(target)
                target = target.rpartition(".")[0]
        edges[module] &= set(modules)
    return edges


def circle(edges: Graph) -> list[str]:
    """The modules of some circle in their order, the first one at the end again; nothing where there is none."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(edges[path[-1]] - done):
            if target in path:
                return [*path[path.index(target) :], target]
            if found := search([*path, target]):
                return found
        done.add(path[-1])
        return []

    for module in edges:
        if found := search([module]):
            return found
    return []
