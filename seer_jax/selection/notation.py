"""Policies as text, for command lines and tables, and as JSON, for files."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seer_jax.outputs import write_json
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import RULES, RankingPolicy, settings_of
from seer_jax.selection.scorers import SCORERS, LearnedGate, Scorer
from seer_jax.settings import parse_number
from seer_jax.text_files import parse_json

POLICY_FILE = ".json"  # how the names of files end that hold a policy
POLICY_KEY = "policy"  # in such a file


def policy_syntax(scorer: str | None = None) -> str:
    """How a policy is written, with the rules that exist.

    Args:
      scorer: what stands in the place of a scorer; None: the names of those that exist.
    """
    rules = "|".join(f"{name}:{rule.metavar}" for name, rule in RULES.items())
    settings = dict.fromkeys(name for rule in RULES.values() for name in settings_of(rule))
    return f"dense|FILE.json|{rules}[:{scorer or '|'.join(SCORERS)}]" + "".join(f"[,{name}=N]" for name in settings)


def parse_policy(text: str) -> Policy:
    """A sparsity policy as written on a command line.

    >>> parse_policy("threshold:5e-4")
    Threshold(threshold=0.0005, scorer=LearnedGate(), dense_last_rows=2, dense_layers=0, skip=None)
    >>> parse_policy("topk:10%") == parse_policy("topk:0.1")
    True
    >>> parse_policy("budget:4096:random,dense_layers=2,seed=7")
    TokenBudget(tokens=4096, scorer=Random(seed=7), dense_layers=2, skip=None)
    >>> str(parse_policy("dense,skip=1e-3"))
    'dense,skip=0.001'

    A name that ends in .json is a file that `write_policy_file` wrote.

    Raises:
      ValueError: it is none.
      OSError: a file can't be read.
    """
    if not isinstance(text, str):
        raise ValueError(f"A policy must be written as text, such as 'topk:0.1'; got {text!r}.")
    if text.endswith(POLICY_FILE):
        return read_policy_file(Path(text))
    rule, *settings = text.split(",")
    name, _, rest = rule.partition(":")
    value, colon, scorer = rest.partition(":")
    try:
        if rule == Dense.name:
            return Dense(**_parse_settings(Dense.name, Dense, None, settings))
        kind = _rule(name)
        ranking = _scorer(scorer) if colon else LearnedGate
        given = _parse_settings(f"{name}:{kind.metavar}:{ranking.name}", kind, ranking, settings)
        return kind(**{kind.value: _number(kind.value, value, _types(kind)[kind.value] is int)}, **given)
    except ValueError as error:
        kind = {Dense.name: Dense, **RULES}.get(name)
        because = str(error).rstrip(".").removeprefix(f"{kind.__name__}." if kind else "")
        raise ValueError(f"{text!r} is not a policy: {because}. A policy is written {policy_syntax()}.") from error


def _rule(name: str) -> type[RankingPolicy]:
    if name not in RULES:
        known = ", ".join([Dense.name, *RULES])
        raise ValueError(
            "dense takes no value" if name == Dense.name else f"the rule must be one of {known}; got {name!r}"
        )
    return RULES[name]


def _scorer(name: str) -> type[Scorer]:
    if name not in SCORERS:
        raise ValueError(f"the scorer must be one of {', '.join(SCORERS)}; got {name!r}")
    return SCORERS[name]


def _number(name: str, text: str, whole: bool) -> int | float:
    """A value; shares may be percentages."""
    try:
        return int(text) if whole else parse_number(text)
    except ValueError:
        must = "a whole number" if whole else "a number such as 0.1, or a percentage such as 10%"
        raise ValueError(f"{name} must be {must}; got {text!r}") from None


def _parse_settings(written: str, rule: type[Policy], scorer: type[Scorer] | None, words: list[str]) -> dict[str, Any]:
    """Fields that are written NAME=N, each once, and only those that the rule or its scorer has."""
    own = settings_of(rule)
    theirs = [] if scorer is None else [name for name, kind in _types(scorer).items() if kind in (int, float)]
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in (*own, *theirs):
            raise ValueError(f"the settings of {written} are {', '.join((*own, *theirs))}; got {name!r}")
        if name in found:
            raise ValueError(f"{name} must be given once; got it twice")
        kind = _types(rule if name in own or scorer is None else scorer)[name]
        found[name] = _number(name, value, kind is int)
    if scorer is None:
        return found
    of_scorer = {name: found.pop(name) for name in list(found) if name not in own}
    return found | {"scorer": scorer(**of_scorer)}


def _types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    simple = {"int": int, "float": float, "bool": bool, "str": str}  # as modules with postponed annotations have them
    return {f.name: simple.get(f.type, f.type) if isinstance(f.type, str) else f.type for f in dataclasses.fields(kind)}


def write_policy(policy: Policy) -> str:
    """The inverse of `parse_policy`, for help texts and reports; values per layer and head are written as their shape.

    >>> write_policy(parse_policy("topk:0.1:random,dense_layers=2"))
    'topk:0.1:random,dense_layers=2'
    """
    return str(policy)


def write_policy_file(path: Path, policy: Policy, **facts: Any) -> None:
    """Writes a policy as a JSON file, which stands for it wherever a policy is written.

    Args:
      path: its name ends in .json.
      policy: of a registered scorer.
      **facts: for readers of the file, JSON; nothing depends on them.
    """
    write_json(path, {POLICY_KEY: policy_to_json(policy), **facts})


def read_policy_file(path: Path) -> Policy:
    """The policy in a file that `write_policy_file` wrote.

    Raises:
      OSError: it can't be read.
      ValueError: it holds none.
    """
    values = parse_json(path.read_bytes(), str(path))
    try:
        return policy_from_json(values[POLICY_KEY])
    except (ValueError, TypeError, KeyError) as error:
        because = f"it has no {error}." if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} must hold a policy, as seer-jax calibrate writes it; {because} Write the policy as text, such as topk:0.1, or "
            "calibrate again."
        ) from error


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """A policy as JSON holds it; the inverse of `policy_from_json`. Arrays become nested lists of their exact values.

    Raises:
      ValueError: the policy or its scorer has no name that leads back to its class.
    """
    kind = _KINDS_BY_TYPE.get(type(policy))
    if kind is None:
        raise ValueError(f"A policy must be one of {', '.join(_KINDS)} to be saved; got {policy!r}.")
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    scorer = fields.pop("scorer", None)
    values = {name: np.asarray(value).tolist() for name, value in fields.items() if value is not None}
    if scorer is not None:
        if SCORERS.get(scorer.name) is not type(scorer):
            raise ValueError(
                f"A policy can be saved only with a registered scorer; got {scorer!r}. "
                "Register its class (seer_jax.selection.scorers.register)."
            )
        values["scorer"] = {"name": scorer.name, **{k: _plain(v) for k, v in dataclasses.asdict(scorer).items()}}
    return {"rule": kind, **values}


def _plain(value: Any) -> Any:
    """A scorer's value as JSON holds it."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, jax.Array)) else value


def policy_from_json(values: Mapping[str, Any]) -> Policy:
    """The policy that `policy_to_json` wrote.

    Raises:
      ValueError: a rule, scorer or setting is unknown, or a value is of another type or out of its domain.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"A saved policy must be a JSON object; got {values!r}.")
    given = dict(values)
    name = given.pop("rule", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"A saved policy must name a rule out of {', '.join(_KINDS)}; got {name!r}.")
    if "scorer" in given and "scorer" in _types(kind):
        given["scorer"] = _scorer_from_json(given["scorer"])
    return _build(f"A saved {name} policy", kind, given)


def _scorer_from_json(values: Any) -> Scorer:
    given = dict(values) if isinstance(values, Mapping) else {"name": values}
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in SCORERS:
        raise ValueError(
            f"A saved policy must name a scorer out of {', '.join(SCORERS)}; got {name!r}. Import the module that registers it first "
            "(seer-jax: --scorers MODULE)."
        )
    return _build(f"A saved scorer {name!r}", SCORERS[name], given)


def _build(subject: str, kind: Any, given: dict[str, Any]) -> Any:
    """An instance of a dataclass from values of JSON, each of the type of its field."""
    fields = _types(kind)
    if unknown := sorted(set(given) - set(fields)):
        raise ValueError(f"{subject} must have the fields {', '.join(fields) or 'none'}; got {', '.join(unknown)}.")
    read = {name: _value(f"{subject}: {name}", fields[name], value) for name, value in given.items()}
    try:
        return kind(**read)
    except TypeError as error:  # a field is absent
        raise ValueError(f"{subject} must hold what its fields take; got {given!r} ({error}).") from error


def _value(subject: str, kind: Any, value: Any) -> Any:
    """A value of JSON for a field of this type; types that are none of the usual ones take what comes."""
    if isinstance(value, Scorer) or (value is None and types.NoneType in typing.get_args(kind)):
        return value
    must, wanted = _EXPECTED.get(kind, ("", ()))
    if float in typing.get_args(kind):
        must, wanted = "a number or an array of numbers", (int, float, list)
    if wanted and type(value) not in wanted:
        raise ValueError(f"{subject} must be {must}; got {value!r}.")
    if list not in wanted:
        return float(value) if kind is float and value is not None else value
    return value if not isinstance(value, list) else _array(subject, must, value, boolean=kind is _MASK)


def _array(subject: str, must: str, value: list[Any], *, boolean: bool) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{subject} must be {must}; got lists of unequal length.") from None
    if array.dtype.kind not in ("b" if boolean else "if"):
        raise ValueError(f"{subject} must be {must}; got {str(value)[:80]}.")
    return array if boolean else array.astype(np.float32)


_MASK = {field.name: field.type for field in dataclasses.fields(Given)}["mask"]
_EXPECTED: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a text", (str,)),
    bool: ("true or false", (bool,)),
    _MASK: ("nested lists of true and false", (list,)),
}
_KINDS: dict[str, Any] = {Dense.name: Dense, "given": Given, **RULES}
_KINDS_BY_TYPE = {kind: name for name, kind in _KINDS.items()}
