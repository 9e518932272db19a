"""Linears that read one activation and hold the same smoothing, scale and down-projection: found when they load.

An export shares these among the projections of one attention. A compiled graph may compute such linears together only
on facts Dynamo guards, so each weight carries a key (:mod:`svdq_compile.ops.share`) in its fingerprint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from ..ops.share import share_key
from ..ops.weight import SHARED_PARTS, SVDQWeight, same_bytes
from ..spec import LinearSpec

SIBLINGS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("img_mod.1", "txt_mod.1"),
)
"""Linears of one attention or block that read the same tensor, by their names in it."""

SAME_IN_ALL_BLOCKS = (("img_mod.1", "txt_mod.1"),)
"""Those of :data:`SIBLINGS` that read the same tensor in every block: the time embedding."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Linears that could share, and why they do not.

    Args:
        names: full names of the linears.
        key: what their weights carry if they share.
        reason: why they do not share, empty if they do.
    """

    names: tuple[str, ...]
    key: str
    reason: str = ""


def mark_shared(weights: Mapping[str, SVDQWeight]) -> None:
    """Gives the weights that share their activation's parts, byte for byte, their key; others lose theirs.

    Args:
        weights: the quantised weights of a model by the names of their linears, all of them; changed in place.
    """
    keys = {name: found.key for found in examine(weights) for name in found.names if not found.reason}
    for name, weight in weights.items():
        weight.fingerprint = dataclasses.replace(weight.fingerprint, share=keys.get(name, ""))


def examine(weights: Mapping[str, SVDQWeight]) -> list[Candidate]:
    """Which linears share and which do not, by comparing bytes where they are, with one wait per device.

    Args:
        weights: as for :func:`mark_shared`.
    """
    groups = [(names, siblings) for siblings in SIBLINGS for names in _present(weights, siblings)]
    inside = _reasons(weights, [names for names, _ in groups])
    found = [
        Candidate(names, share_key(siblings), reason) for (names, siblings), reason in zip(groups, inside, strict=True)
    ]
    for siblings in SAME_IN_ALL_BLOCKS:
        ours = [each for each in found if each.key == share_key(siblings)]
        everywhere = tuple(name for each in ours for name in each.names)
        if len(ours) > 1 and not any(each.reason for each in ours) and _one_list(everywhere, siblings):
            (reason,) = _reasons(weights, [everywhere])
            if not reason:
                key = share_key(siblings, in_all=True)
                found = [dataclasses.replace(each, key=key) if each in ours else each for each in found]
    return found


def _present(weights: Mapping[str, SVDQWeight], siblings: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Full names of siblings, for every module that has one of them quantised."""
    owners = [
        name.removesuffix(sibling)
        for name in weights
        for sibling in siblings
        if name == sibling or name.endswith("." + sibling)
    ]
    for owner in dict.fromkeys(owners):
        yield tuple(owner + sibling for sibling in siblings)


def _one_list(names: tuple[str, ...], siblings: tuple[str, ...]) -> bool:
    """Whether all of these linears are parts of the elements of one list of modules."""
    owners = {name.removesuffix("." + sibling) for name in names for sibling in siblings if name.endswith(sibling)}
    return len({owner.rpartition(".")[0] for owner in owners}) == 1 and all(
        owner.rpartition(".")[2].isdigit() for owner in owners
    )


def _reasons(weights: Mapping[str, SVDQWeight], groups: list[tuple[str, ...]]) -> list[str]:
    """Per group of linears, why they do not share; empty where they do."""
    reasons = [_kinds_differ(weights, names) for names in groups]
    compared: dict[torch.device, list[tuple[int, str, torch.Tensor]]] = {}
    for index, names in enumerate(groups):
        if reasons[index]:
            continue
        first = weights[names[0]]
        for name in names[1:]:
            for part in SHARED_PARTS:
                if getattr(first, part) is not None:
                    equal = same_bytes(getattr(first, part), getattr(weights[name], part))
                    compared.setdefault(equal.device, []).append((index, f"{name}.{part} differs", equal))
    for entries in compared.values():
        for (index, reason, _), equal in zip(entries, torch.stack([e for *_, e in entries]).tolist(), strict=True):
            if not equal and not reasons[index]:
                reasons[index] = reason
    return reasons


def _kinds_differ(weights: Mapping[str, SVDQWeight], names: tuple[str, ...]) -> str:
    for name in names:
        if name not in weights:
            return f"{name} is not quantised"
        weight, first = weights[name], weights[names[0]]
        if weight.device.type == "meta":
            return f"{name} has no data"
        if weight.device != first.device:
            return f"{name} is on another device"
        if _activation(weight.spec) != _activation(first.spec):
            return f"{name} is {weight.spec.describe()}, {names[0]} is {first.spec.describe()}"
    return ""


def _activation(spec: LinearSpec) -> LinearSpec:
    """What of a spec the activation's side depends on: everything but how many features come out."""
    return dataclasses.replace(spec, out_features=0)
