"""`seer-jax info`: versions, devices and implementations."""

import importlib
import importlib.metadata
import os
import platform

import jax

import seer_jax
from pallas_kernels.backends import Operation

CORE_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "safetensors")
OPTIONAL_PACKAGES = {"jax-cuda13-plugin": "cuda13", "matplotlib": "plot", "tensorboardX": "train", "datasets": "data"}
OPERATION_FOLDERS = (
    "block_sparse_attention",
    "block_ground_truth",
    "sparse_decode",
    "gate_selection",
    "block_pooling",
    "gate_scores",
)


def describe() -> str:
    """Versions, devices, and which implementation each operation uses on them."""
    lines = [
        f"seer-jax {seer_jax.__version__}, Python {platform.python_version()}, {platform.platform()}",
        "",
        "Packages",
    ]
    lines += [f"  {name:<18} {importlib.metadata.version(name)}" for name in CORE_PACKAGES]
    for name, extra in OPTIONAL_PACKAGES.items():
        try:
            lines.append(f"  {name:<18} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name:<18} not installed (pip install 'seer-jax[{extra}]')")
    lines += ["", "Devices"]
    lines += [f"  {device.platform}:{device.id}  {device.device_kind}" for device in jax.devices()]
    lines += [f"  CPU cores         {os.cpu_count()}", "", "Operations"]
    for operation in map(_operation, OPERATION_FOLDERS):
        used = operation.used_here()
        others = [name for name in operation.implementations if name != used]
        lines.append(f"  {operation.name:<28} {used} (also there: {', '.join(others)})")
    return "\n".join(lines)


def _operation(folder: str) -> Operation:
    api = importlib.import_module(f"pallas_kernels.{folder}.api")
    return next(value for value in vars(api).values() if isinstance(value, Operation))
