"""Run as a program by each of two processes: reads a model onto a mesh of both, generates, scores windows, and prints what was read and made, as JSON.

python one_of_two.py number port mesh folder
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from seer_jax import Threshold, TokenBudget, from_pretrained, generate
from seer_jax.convert.formats.sources import SafetensorsSource
from seer_jax.evaluate.scoring import score_each, score_windows
from seer_jax.sharding import make_mesh


def main(number: str, port: str, mesh: str, folder: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    rows: dict[str, set[int]] = {}
    read = SafetensorsSource.read

    def noted(self: SafetensorsSource, name: str, start: int, stop: int) -> np.ndarray:
        rows.setdefault(name, set()).update(range(start, stop))
        return read(self, name, start, stop)

    SafetensorsSource.read = noted
    gates = [f"{folder}/prefill", f"{folder}/decode"]
    model = from_pretrained(f"{folder}/base", gates, dtype=jnp.float32, mesh=make_mesh(mesh))
    tokens = np.arange(4 * 48).reshape(4, 48) % 61
    made = generate(model, tokens, max_new_tokens=5, prefill=Threshold(0.1), decode=TokenBudget(32), eos=())
    scores = score_each(score_windows, model, tokens[:3], TokenBudget(32))
    assert scores is not None
    print(
        json.dumps(
            {
                "tokens": np.asarray(made.tokens).tolist(),
                "rows": {name: len(r) for name, r in rows.items()},
                "losses": scores.nll.tolist(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
