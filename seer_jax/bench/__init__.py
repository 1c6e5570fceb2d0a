"""`seer-jax bench`: how fast the operations and whole models are on this machine."""

from seer_jax.bench.ground_truth import GroundTruthBench, bench_ground_truth, measure_ground_truth
from seer_jax.bench.prefill import PrefillBench, bench_prefill, measure_prefill

__all__ = [
    "GroundTruthBench",
    "PrefillBench",
    "bench_ground_truth",
    "bench_prefill",
    "measure_ground_truth",
    "measure_prefill",
]
