"""`seer-jax bench scaling`: a model over the devices of a mesh, beside one device."""

from seer_jax.bench.scaling.config import ScalingBench
from seer_jax.bench.scaling.measure import bench_scaling, measure_scaling

__all__ = ["ScalingBench", "bench_scaling", "measure_scaling"]
