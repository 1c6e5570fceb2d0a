"""`seer-jax bench`: how fast the operations and whole models are on this machine."""

from seer_jax.bench.configs import DecodeBench, GroundTruthBench, PrefillBench, TrainBench
from seer_jax.bench.decode import bench_decode, measure_decode
from seer_jax.bench.ground_truth import bench_ground_truth, measure_ground_truth
from seer_jax.bench.prefill import bench_prefill, measure_prefill
from seer_jax.bench.scaling import ScalingBench, bench_scaling, measure_scaling
from seer_jax.bench.serving import ServingBench, bench_serving, measure_serving
from seer_jax.bench.training import bench_training, measure_training

__all__ = [
    "DecodeBench",
    "GroundTruthBench",
    "PrefillBench",
    "ScalingBench",
    "ServingBench",
    "TrainBench",
    "bench_decode",
    "bench_ground_truth",
    "bench_prefill",
    "bench_scaling",
    "bench_serving",
    "bench_training",
    "measure_decode",
    "measure_ground_truth",
    "measure_prefill",
    "measure_scaling",
    "measure_serving",
    "measure_training",
]
