"""Models over several devices: meshes, the table of how weights are split, and the passes that run on them.

A model on a mesh runs under one `jax.shard_map`, in which every device has a part of each array: kernels see local shapes, and the code
of a layer is that of a single device. Rows of a batch are split over `data` and `fsdp`; heads, MLP channels and the vocabulary over
`tensor`; weights are also split over `fsdp`, and gathered one layer at a time. The devices of `tensor` exchange two sums in each layer.
"""

from seer_jax.sharding.layout import Layout, place
from seer_jax.sharding.mesh import make_abstract_mesh, make_mesh

__all__ = ["Layout", "make_abstract_mesh", "make_mesh", "place"]
