"""`seer-jax bench`: how fast the operations and whole models are on this machine."""

from seer_jax.bench.configs import DecodeBench, GroundTruthBench, PrefillBench, TrainBench
from seer_jax.bench.decode import bench_decode, measure_decode
from seer_jax.bench.ground_truth import bench_ground_truth, measure_ground_truth
from seer_jax.bench.prefill import bench_prefill, measure_prefill
from seer_jax.bench.training import bench_training, measure_training

__all__ = [
    "DecodeBench",
    "GroundTruthBench",
    "PrefillBench",
    "TrainBench",
    "bench_decode",
    "bench_ground_truth",
    "bench_prefill",
    "bench_training",
    "measure_decode",
    "measure_ground_truth",
    "measure_prefill",
    "measure_training",
]
