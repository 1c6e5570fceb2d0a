"""Where the checkout keeps what it installs."""

import functools
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folder at the top of the checkout -> name of the package it installs as.
PACKAGES = {"pallas_kernels": "pallas_kernels", "seer_jax": "seer_jax", "train": "seer_jax.train"}
PACKAGES |= {"convert": "seer_jax.convert"}
RECIPE = Path("seer_jax/tiny_lm/recipe")  # data: scripts that run in an environment of their own


@functools.cache
def modules() -> dict[str, Path]:
    """Returns every module's name and file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if RECIPE in path.relative_to(ROOT).parents:
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found
