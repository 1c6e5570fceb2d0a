"""Compiled programs that a command keeps for the next one, in the user's cache folder."""

import hashlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

SETTING = "SEER_JAX_COMPILATION_CACHE"
OFF = "off"
MAX_BYTES = 2 * 2**30  # the programs that were not used for longest go first


def use_compilation_cache(environment: Mapping[str, str] = os.environ) -> None:
    """Lets JAX keep all programs of this process on disk, and look there first.

    A folder that the user has set for JAX itself stays as it is; one that cannot be written is no error.

    Args:
      environment: with SEER_JAX_COMPILATION_CACHE: a folder, or "off". Without it, `default_folder`.
    """
    import jax

    folder = _folder(environment)
    if folder is None or environment.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    # An entry that a killed process left unfinished is compiled as if it were not there.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones take seconds together
    if importlib.util.find_spec("filelock"):  # JAX needs it to count what other processes write
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def default_folder(environment: Mapping[str, str]) -> Path:
    """`seer-jax/programs` in the user's cache folder, with a folder for each kind of CPU, as programs may use all that it has."""
    if base := environment.get("XDG_CACHE_HOME"):
        caches = Path(base)
    else:
        caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return caches / "seer-jax" / "programs" / _cpu()


def _folder(environment: Mapping[str, str]) -> Path | None:
    named = environment.get(SETTING)
    if named == OFF:
        return None
    try:
        return Path(named).expanduser() if named else default_folder(environment)
    except RuntimeError:  # there is no home
        return None


def _cpu() -> str:
    """A name for what the CPUs of this host can do: homes may be shared by hosts of several kinds."""
    try:
        with open("/proc/cpuinfo") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
