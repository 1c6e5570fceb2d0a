"""`seer-jax bench`: how fast the operations and whole models are on this machine."""

from seer_jax.bench.prefill import PrefillBench, bench_prefill, measure_prefill

__all__ = ["PrefillBench", "bench_prefill", "measure_prefill"]
