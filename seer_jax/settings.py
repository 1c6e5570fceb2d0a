"""Settings of configuration dataclasses, checked against their types wherever they come from: Python, YAML or JSON."""

import dataclasses
import decimal
import enum
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Any


def check_types(config: Any) -> None:
    """Gives each field of a frozen dataclass a value of its declared type; called first in `__post_init__`.

    A value that can mean only one thing is converted: the text of an enum's member, a whole number where a float is meant, a list or a
    single text where a tuple is, a mapping where a dataclass is, a path where a text is.

    Raises:
      ValueError: a value is of another type, or a number is not finite.
    """
    kind = type(config)
    for name, expected in _fields(kind).items():
        object.__setattr__(config, name, parse_setting(expected, getattr(config, name), f"{kind.__name__}.{name}"))


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def parse_setting(kind: Any, value: Any, place: str) -> Any:
    """`value` as an instance of the type `kind`, one of those that configurations are made of.

    Args:
      kind: a dataclass, an enum of texts, int, float, bool, str, a tuple of one of them, or one of them or None.
      value: what was given.
      place: the setting's name, for errors; "" for the whole of a file, whose settings go by their keys.

    Raises:
      ValueError: it is of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return parse_setting(next(a for a in arguments if a is not types.NoneType), value, place)
    if origin is tuple:
        return _parse_tuple(arguments[0], value, place)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(kind):
        return _parse_mapping(kind, value, place)
    return _parse_value(kind, value, place)


def _parse_value(kind: type, value: Any, place: str) -> Any:
    if issubclass(kind, enum.StrEnum):
        if isinstance(value, str) and value in list(kind):
            return kind(value)
        raise ValueError(f"{place} must be one of {', '.join(kind)}; got {value!r}.")
    if kind is float:
        return _parse_float(value, place)
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # integers of NumPy too
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)  # folders are written as text
    if kind is not int and isinstance(value, kind):
        return value
    raise ValueError(f"{place} must be of type {kind.__name__}; got {value!r}.")


def _parse_tuple(kind: Any, value: Any, place: str) -> tuple:
    if isinstance(value, (str, os.PathLike)):
        value = (value,)  # a lone text; its letters are never meant
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{place} must be a list of {kind.__name__}; got {value!r}.")
    return tuple(parse_setting(kind, v, f"{place}[{i}]") for i, v in enumerate(value))


def _parse_mapping(kind: Any, value: Mapping, place: str) -> Any:
    fields = _fields(kind)
    if unknown := [str(key) for key in value if key not in fields]:
        of = f" of {place}" if place else ""
        raise ValueError(f"Settings{of} must be some of {', '.join(fields)}; got {', '.join(unknown)}.")
    prefix = f"{place}." if place else ""
    return kind(**{key: parse_setting(fields[key], v, prefix + key) for key, v in value.items()})


def parse_number(text: str) -> float:
    """A number as users write it; 10% is 0.1.

    >>> parse_number("1e-3"), parse_number("0.7%")
    (0.001, 0.007)

    Raises:
      ValueError: it is none.
    """
    body = text.strip()
    if not body.endswith("%"):
        return float(body)
    try:
        return float(decimal.Decimal(body.removesuffix("%")) / 100)
    except decimal.InvalidOperation:
        raise ValueError(f"could not convert string to float: {text!r}") from None


def _parse_float(value: Any, place: str) -> float:
    number = math.nan
    if isinstance(value, (numbers.Real, str)) and not isinstance(value, bool):
        try:
            # YAML reads 1e-3, without a dot, as text.
            number = parse_number(value) if isinstance(value, str) else float(value)
        except ValueError:
            raise ValueError(f"{place} must be a number; got {value!r}.") from None
    if not math.isfinite(number):
        raise ValueError(f"{place} must be a finite number; got {value!r}.")
    return number
