"""`seer-jax bench serving`: requests that come at random times, in the slots of an engine and one after the other."""

from seer_jax.bench.serving.config import ServingBench
from seer_jax.bench.serving.measure import bench_serving, measure_serving

__all__ = ["ServingBench", "bench_serving", "measure_serving"]
