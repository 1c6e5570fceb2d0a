"""Run as a program on several devices: loads a folder sharded, at once and in pieces, and whole, and prints whether all are the same, as
JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seer_jax.convert import load_base, stream
from seer_jax.convert.formats.sources import SafetensorsSource


def main(folder: str) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    specs = {
        "layers.mlp.up_proj.weight": PartitionSpec(None, "x", "y"),
        "layers.self_attn.q_proj.weight": PartitionSpec("x", "y"),
        "layers.self_attn.o_proj.weight": PartitionSpec(None, None, ("x", "y")),
        "embed_tokens": PartitionSpec(("x", "y")),
    }

    def sharding(path: str, spec: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, specs.get(path, PartitionSpec()))

    whole = load_base(folder, dtype=jnp.float32)
    rows = []
    read = SafetensorsSource.read

    def noted(self: SafetensorsSource, name: str, start: int, stop: int) -> np.ndarray:
        if name == "model.layers.1.self_attn.q_proj.weight":
            rows.append(stop - start)
        return read(self, name, start, stop)

    SafetensorsSource.read = noted
    same, rows_of_one_layer = [], []
    for chunk in (stream.CHUNK_BYTES, 500):
        stream.CHUNK_BYTES = chunk
        sharded = load_base(folder, dtype=jnp.float32, sharding=sharding)
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True)
        same.append(all((np.asarray(a) == np.asarray(b)).all() and a.dtype == b.dtype for a, b in pairs))
        rows_of_one_layer.append(sum(rows))
        rows.clear()
    print(
        json.dumps(
            {
                "devices": len(jax.devices()),
                "same": same,
                "shard": list(sharded.layers.self_attn.q_proj.weight.addressable_shards[0].data.shape),
                "rows_of_one_layer": rows_of_one_layer,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
