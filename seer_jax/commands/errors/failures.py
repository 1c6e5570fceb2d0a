"""Failures as one line: errors that a user can cause, devices that are not there, memory that runs out."""

import os
import re
import sys

# Errors that a user can cause and fix; any other one is a defect of the program and keeps its traceback.
EXPECTED = (ValueError, OSError, MemoryError, NotImplementedError, ImportError, FloatingPointError)
LONGEST = 2000  # characters of a line

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")


def one_line(text: str) -> str:
    """A text without line breaks, control characters and what exceeds a screen."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def failure(error: BaseException, lower: str) -> str | None:
    """What an error means to a user; None: it is a defect of the program.

    Args:
      error: as a command raised it.
      lower: what takes less memory in this command.
    """
    if ran_out := _memory(error, lower):
        return ran_out
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}. {_remedy(error)}"
    if isinstance(error, EXPECTED):
        return str(error) or type(error).__name__
    return _no_device()


def _remedy(error: OSError) -> str:
    """What to do about a file that Python can't open, read or write."""
    match error:
        case IsADirectoryError():
            return "Name a file in it."
        case PermissionError():
            return "Change its permissions, or choose another place."
        case FileNotFoundError() | NotADirectoryError():
            return "Check the path."
    return "Check the path and its disk, or choose another place."


def _memory(error: BaseException, lower: str) -> str | None:
    """The line of an allocation that failed, by JAX (an XlaRuntimeError), NumPy or Python."""
    text = str(error)
    if isinstance(error, MemoryError):
        if text and "Unable to allocate" not in text:
            return text  # of a plan, which says what to do
    elif not (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        return None
    wanted = re.search(r"allocat\w+ (?:of )?\(?([\d.]+ ?[KMGTPE]?i?B(?:ytes)?|\d+ bytes)", text)
    return (
        f"the memory of the device or the host ran out{f', at an allocation of {wanted[1]}' if wanted else ''}. Lower {lower}; on a GPU, "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX take more than its usual 75% of the memory."
    )


def _no_device() -> str | None:
    """The line for a computer on which JAX finds no device; None where it finds one."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except Exception as error:  # JAX raises RuntimeError or AssertionError, by platform
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = f"JAX_PLATFORMS={platforms} asks for a device" if platforms else "JAX asks for a device"
        return (
            f"{asked} that is not there{f' ({error})' if str(error) else ''}. Unset JAX_PLATFORMS, or install what JAX needs for it "
            "(NVIDIA GPUs: pip install 'jax[cuda13]')."
        )
    return None
