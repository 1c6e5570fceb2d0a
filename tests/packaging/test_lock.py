"""requirements.lock names exact versions of everything, and nothing that would be wrong on another machine."""

import importlib.metadata
import re

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.packaging.checkout import PROJECT, ROOT

LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in LINES)}
INSTALLED_EXTRAS = ["train", "plot", "dev"]  # those of the Makefile
DECLARED = [*PROJECT["project"]["dependencies"]]
DECLARED += [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]


def test_every_line_is_a_pin():
    assert not [line for line in LINES if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line)]
    assert len(LOCK) == len(LINES)


def test_no_other_framework():
    assert not LOCK.keys() & {"torch", "tensorflow", "tensorflow-cpu", "seer-jax"}


@pytest.mark.parametrize("line", DECLARED)
def test_every_declared_dependency_is_locked_in_its_range(line: str):
    requirement = Requirement(line)
    assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


def requirements(distribution: str, extras: set[str]) -> list[Requirement]:
    """Returns what a distribution needs in this environment."""
    needed = []
    for line in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(line)
        contexts = [{**default_environment(), "extra": extra} for extra in extras | {""}]
        if not requirement.marker or any(requirement.marker.evaluate(context) for context in contexts):
            needed.append(requirement)
    return needed


def test_everything_that_is_installed_is_locked():
    waiting = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    for extra in INSTALLED_EXTRAS:
        waiting += map(Requirement, PROJECT["project"]["optional-dependencies"][extra])
    seen = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            waiting += requirements(requirement.name, set(requirement.extras))
    assert not {name for name, _ in seen} - LOCK.keys()
