"""seer-jax as a model of lm-evaluation-harness, with sparsity policies (extra `eval`; no PyTorch is needed).

The harness knows models by Python modules alone, so its own command is started from here:

    python -m seer_jax.evaluate.harness run --model seer-jax --model_args pretrained=NAME,gates=NAME,prefill=topk:0.1 --tasks hellaswag
"""
