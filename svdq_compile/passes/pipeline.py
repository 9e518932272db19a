"""Every pass on Dynamo's graph, in the order they run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import fx

from .. import _compat
from .attention_layout import attention_layout
from .base import GraphPass, Report
from .fuse_feed_forward import fuse_feed_forward
from .insert_linear import insert_linear
from .joint_feed_forward import joint_feed_forward
from .joint_heads import joint_heads
from .joint_linear import joint_linear
from .modulate import modulate
from .real_rope import real_rope
from .share_inputs import share_inputs

log = logging.getLogger(__name__)

PASSES: tuple[GraphPass, ...] = (
    attention_layout,
    insert_linear,
    share_inputs,
    joint_heads,
    joint_linear,
    real_rope,
    fuse_feed_forward,
    joint_feed_forward,
    modulate,
)


def rewrite(gm: fx.GraphModule, compute: str = "auto", skip: Collection[str] = ()) -> dict[str, Report]:
    """Runs every pass on a graph, in place.

    Args:
        gm: Dynamo's graph.
        compute: mode of the weights whose own is ``auto``.
        skip: names of optional passes to leave out.

    Returns:
        Name -> report, of the passes that ran.
    """
    reports = {}
    for each in PASSES:
        if each.name not in skip:
            reports[each.name] = each(gm, compute) if each is insert_linear else each(gm)
            log.info("%s", reports[each.name].summary().splitlines()[0])
    return reports


def wanted_settings(reports: Mapping[str, Report], given: Collection[str]) -> dict[str, int]:
    """Inductor's settings that the passes which found something want raised, but for those the user has given."""
    settings: dict[str, int] = {}
    for each in PASSES:
        if each.name in reports and reports[each.name].matched:
            for name, least in each.at_least.items():
                current = settings.get(name, getattr(_compat.inductor_config, name) or 0)
                if name not in given and current < least:
                    settings[name] = least
    return settings
