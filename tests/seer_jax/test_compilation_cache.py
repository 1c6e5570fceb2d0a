"""Compiled programs on disk: where they go, who decides, and that the second process finds them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from seer_jax.compilation_cache import default_folder, use_compilation_cache

NAMES = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "compilation_cache_max_size")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """JAX's own settings are those of the tests again afterwards."""
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def folder() -> str | None:
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_and_found_again(tmp_path: Path):
    use_compilation_cache({"SEER_JAX_COMPILATION_CACHE": str(tmp_path / "new" / "folder")})
    compilation_cache.reset_cache()
    assert folder() == str(tmp_path / "new" / "folder")
    hits: list[Any] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    for expected in (0, 1):
        jax.clear_caches()
        assert jax.jit(lambda x: x * 3 + 1)(jnp.arange(5))[4] == 13
        assert (len(hits) > 0) == expected
    files = list((tmp_path / "new" / "folder").glob("*-cache"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:20])  # as a killed process leaves it
    jax.clear_caches()
    assert jax.jit(lambda x: x * 3 + 1)(jnp.arange(5))[4] == 13


def test_the_default_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    use_compilation_cache(environment)
    assert folder() == str(default_folder(environment))
    assert default_folder(environment).parent == tmp_path / "seer-jax" / "programs"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tmp_path / "home" in default_folder({}).parents


@pytest.mark.parametrize("how", ["off", "JAX_COMPILATION_CACHE_DIR", "a file", "jax.config"])
def test_others_decide(how: str, tmp_path: Path):
    (tmp_path / "file").touch()
    own = None
    match how:
        case "off":
            environment = {"SEER_JAX_COMPILATION_CACHE": "off"}
        case "a file":
            environment = {"SEER_JAX_COMPILATION_CACHE": str(tmp_path / "file")}
        case "jax.config":
            environment, own = {"SEER_JAX_COMPILATION_CACHE": str(tmp_path / "ours")}, str(tmp_path / "own")
            jax.config.update("jax_compilation_cache_dir", own)
        case _:
            environment = {"SEER_JAX_COMPILATION_CACHE": str(tmp_path / "ours"), how: str(tmp_path / "own")}
    use_compilation_cache(environment)
    assert folder() == own and not (tmp_path / "ours").exists()
