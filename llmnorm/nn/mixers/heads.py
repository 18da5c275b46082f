"""How many heads a mixer has, where that can go wrong.

The settings refuse the same before a mixer is built; these checks are for who builds one directly.
"""

from llmnorm.part import InputError


def whole_heads(inner: int, head_dim: int, n_groups: int) -> int:
    """How many heads of `head_dim` fill the inner width.

    Raises:
        InputError: they leave a rest, or the groups cannot have equally many of them.
    """
    heads, rest = divmod(inner, head_dim)
    if rest:
        raise InputError(f"head_dim {head_dim} does not divide expand * hidden_size = {inner}")
    if heads % n_groups:
        raise InputError(f"n_groups {n_groups} does not divide the {heads} heads")
    return heads


def value_heads_per_key_head(value_heads: int, key_heads: int) -> int:
    """How many value heads read the same key head.

    Raises:
        InputError: not every key head can have equally many.
    """
    if value_heads % key_heads:
        raise InputError(
            f"num_value_heads {value_heads} is not a multiple of num_key_heads {key_heads}"
        )
    return value_heads // key_heads
