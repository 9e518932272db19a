"""Share keys: how a weight's fingerprint says which others hold the same smoothing, scale and down-projection.

``to_q+to_k+to_v`` holds among the linears of these names in one module. ``*.img_mod.1+txt_mod.1`` holds among them in
all elements of one list of modules. A key names no block, so that equal blocks have equal keys and share one graph;
which weights a key is about follows from where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

ALL = "*."


def share_key(siblings: Sequence[str], in_all: bool = False) -> str:
    """The key of linears.

    Args:
        siblings: their names in the module they are part of.
        in_all: whether it holds among all elements of the list that module is in.
    """
    return (ALL if in_all else "") + "+".join(siblings)


def scope(key: str, path: Sequence[str]) -> tuple[str, ...] | None:
    """Where a key holds: weights of one key and one scope share.

    Args:
        key: of the weight.
        path: names on the way to the linear that has it, from the outermost module.

    Returns:
        The path of the module or list of modules; None if the linear's name is not among the key's.
    """
    for sibling in key.removeprefix(ALL).split("+"):
        names = sibling.split(".")
        if list(path[-len(names) :]) == names:
            owner = tuple(path[: -len(names)])
            return owner[:-1] if key.startswith(ALL) and owner and owner[-1].isdigit() else owner
    return None
