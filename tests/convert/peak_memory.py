"""Run as a program: loads a model folder and prints how much host memory that took at most, as JSON.

python peak_memory.py warm_up_folder folder dtype [mesh [number port]]; with a number it is one of two processes whose devices make the mesh.
"""

import json
import sys

import jax
import jax.numpy as jnp

from seer_jax import Transformer, from_pretrained
from seer_jax.convert import stream
from seer_jax.sharding import make_mesh


def status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(warm_up: str, folder: str, dtype: str, mesh: str = "tensor=1", number: str = "", port: str = "") -> None:
    if number:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, int(number))

    def load(folder: str) -> Transformer:
        return from_pretrained(folder, dtype=jnp.dtype(dtype), mesh=make_mesh(mesh))

    at_once, stream.CHUNK_BYTES = (
        stream.CHUNK_BYTES,
        4096,
    )  # so that the small model is written in pieces as the large one is
    load(warm_up)  # imports, compiler and thread pools
    stream.CHUNK_BYTES = at_once
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    model = load(folder)
    peak, stays = status("VmHWM") - before, status("VmRSS") - before
    leaves = jax.tree.leaves(model)
    parts = [[part.data.nbytes for part in leaf.addressable_shards] for leaf in leaves]
    print(
        json.dumps({"peak": peak, "stays": stays, "kept": sum(map(sum, parts)), "largest_part": max(map(max, parts))})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
