"""Print versions, devices, the implementation that each operation uses, and gates by name."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from collections.abc import Iterator

import jax

import pallas_kernels
import seer_jax
from pallas_kernels.backends import Operation
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.errors.usage import UsageParser
from seer_jax.convert.gate_config import gate_config_from_hf
from seer_jax.gates.configs import changed_settings
from seer_jax.models.hub import GATES, named_gates, read_config

CORE_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "safetensors")
# Package: what pip installs it by.
OPTIONAL_PACKAGES = {"jax-cuda13-plugin": "jax[cuda13]"} | {
    name: name for name in ("matplotlib", "tensorboardX", "pyarrow", "datasets", "gguf")
}


def run(words: list[str]) -> int:
    UsageParser(f"{PROGRAM} info", description=__doc__).parse_args(words)
    print(describe())
    return ExitCode.OK


def describe() -> str:
    """Versions, devices, the implementation that each operation uses on them, and what the names of gates stand for."""
    lines = [
        f"seer-jax {seer_jax.__version__}, Python {platform.python_version()}, {platform.platform()}",
        "",
        "Packages",
    ]
    lines += [f"  {name:<18} {importlib.metadata.version(name)}" for name in CORE_PACKAGES]
    for name, package in OPTIONAL_PACKAGES.items():
        try:
            lines.append(f"  {name:<18} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name:<18} not installed (pip install '{package}')")
    lines += ["", "Devices"]
    lines += [f"  {device.platform}:{device.id}  {device.device_kind}" for device in jax.devices()]
    lines += [f"  CPU cores         {os.cpu_count()}", "", "Operations"]
    for operation in operations():
        used = operation.used_here()
        others = [name for name in operation.implementations if name != used]
        lines.append(f"  {operation.name:<28} {used} (also available: {', '.join(others)})")
    lines += ["", "Gates by name"]
    lines += [f"  {name:<16}  {kinds_of(name)}" for name in GATES]
    return "\n".join(lines)


def kinds_of(name: str) -> str:
    """Settings of the gates that a name stands for, where they are not the defaults."""
    configs = {kind: gate_config_from_hf(read_config(folder)) for kind, folder in named_gates(name).items()}
    return "; ".join(f"{kind}: {changed_settings(config) or 'defaults'}" for kind, config in configs.items()) or "none"


def operations() -> Iterator[Operation]:
    """Every operation: each folder of `pallas_kernels` that has a module `api` defines one there."""
    for folder in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels."):
        if folder.ispkg and importlib.util.find_spec(f"{folder.name}.api") is not None:
            api = importlib.import_module(f"{folder.name}.api")
            yield from (value for value in vars(api).values() if isinstance(value, Operation))
