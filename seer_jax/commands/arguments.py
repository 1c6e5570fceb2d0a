"""Arguments that several commands take."""

from typing import Annotated

import tyro

from seer_jax.selection.notation import parse_policy, write_policy
from seer_jax.selection.policies import Policy

PolicyArgument = Annotated[
    Policy,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="POLICY",
        instance_from_str=lambda words: parse_policy(words[0]),
        is_instance=lambda value: isinstance(value, Policy),
        str_from_instance=lambda policy: [write_policy(policy)],
    ),
]
