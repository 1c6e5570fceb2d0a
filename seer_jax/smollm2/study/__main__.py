"""The study as a command: `python -m seer_jax.smollm2.study --train FILE --held-out FILE --output FOLDER`."""

import inspect
import sys
from collections.abc import Sequence

from seer_jax.compilation_cache import use_compilation_cache
from seer_jax.smollm2.study.config import StudyConfig
from seer_jax.smollm2.study.run import run_study
from seer_jax.smollm2.study.variants import BASELINES, ORDER, VARIANTS


def main(words: Sequence[str] | None = None) -> int:
    """Runs the study; returns 1 where a variant or the whole failed."""
    import tyro

    meanings = {BASELINES: "dense attention, oracles, XAttention, Quest"}
    meanings |= {name: variant.meaning for name, variant in VARIANTS.items()}
    about = inspect.cleandoc(StudyConfig.__doc__ or "").partition("\n\nAttributes:")[0]
    lines = "\n".join(f"  {name}: {meanings[name]}" for name in ORDER)
    prog = "python -m seer_jax.smollm2.study"
    use_compilation_cache()
    try:
        config = tyro.cli(
            StudyConfig,
            prog=prog,
            args=words,
            description=f"{about}\n\nVariants:\n{lines}",
            config=(tyro.conf.EnumChoicesFromValues,),
        )
        return 1 if run_study(config, lambda line: print(line, flush=True)) else 0
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from what is kept.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
