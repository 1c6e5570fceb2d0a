"""`seer-jax bench`: how fast the operations and whole models are on this machine."""

from seer_jax.bench.prefill import PrefillBench, bench_prefill, measure_prefill
from seer_jax.bench.training import TrainBench, bench_training, measure_training

__all__ = ["PrefillBench", "TrainBench", "bench_prefill", "bench_training", "measure_prefill", "measure_training"]
