"""The extension as a command: `python -m seer_jax.smollm2.extension --train FILE --held-out FILE --output FOLDER`."""

import inspect
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from seer_jax.compilation_cache import use_compilation_cache
from seer_jax.smollm2.extension.config import MEANINGS, ExtensionConfig
from seer_jax.smollm2.extension.run import run_extension


def main(words: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 1 where one fails."""
    import tyro

    about = inspect.cleandoc(ExtensionConfig.__doc__ or "").partition("\n\nAttributes:")[0]
    lines = "\n".join(f"  {stage}: {meaning}" for stage, meaning in MEANINGS.items())
    use_compilation_cache()
    try:
        config = tyro.cli(
            ExtensionConfig,
            prog="python -m seer_jax.smollm2.extension",
            args=words,
            description=f"{about}\n\nStages:\n{lines}",
            config=(tyro.conf.EnumChoicesFromValues,),
        )
        run_extension(config, lambda line: print(line, flush=True))
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from what is kept.", file=sys.stderr)
        return 130
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process by an exception, so that the seconds of a stage are kept."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
