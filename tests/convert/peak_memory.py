"""Run as a program: loads a model folder and prints how much host memory that took at most, as JSON.

python peak_memory.py warm_up_folder folder dtype
"""

import json
import sys

import jax
import jax.numpy as jnp

from seer_jax.convert import load_base


def status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(warm_up: str, folder: str, dtype: str) -> None:
    load_base(warm_up, dtype=jnp.dtype(dtype))  # imports, compiler and thread pools
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    model = load_base(folder, dtype=jnp.dtype(dtype))
    peak = status("VmHWM") - before
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    print(json.dumps({"peak": peak, "kept": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
