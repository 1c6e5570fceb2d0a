"""`seer-jax bench`: how fast the operations and whole models are on this machine."""

from seer_jax.bench.ground_truth import GroundTruthBench, bench_ground_truth, measure_ground_truth
from seer_jax.bench.prefill import PrefillBench, bench_prefill, measure_prefill
from seer_jax.bench.training import TrainBench, bench_training, measure_training

__all__ = [
    "GroundTruthBench",
    "PrefillBench",
    "TrainBench",
    "bench_ground_truth",
    "bench_prefill",
    "bench_training",
    "measure_ground_truth",
    "measure_prefill",
    "measure_training",
]
