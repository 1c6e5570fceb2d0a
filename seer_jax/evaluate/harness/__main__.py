"""The command of lm-evaluation-harness, which knows the model `seer-jax` here."""

import sys

from seer_jax.evaluate.harness.adapter import harness_class


def main() -> int:
    """Runs the harness's command line."""
    try:
        harness_class()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
