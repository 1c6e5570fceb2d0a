"""The checker behind jaxtyping's import hook: beartype, with an int wherever a float is asked for (PEP 484)."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
