"""The ``svdq`` backend of ``torch.compile``: our pass on Dynamo's graph, then Inductor.

Dynamo finds :func:`svdq` through the ``torch_dynamo_backends`` entry point; nothing needs to be imported first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from . import _compat, options
from .errors import StrictError
from .lowering.select import select
from .passes.base import SourceKeyed
from .passes.insert_linear import Report, insert_linear

log = logging.getLogger(__name__)


def svdq(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    **_unused: object,
) -> Callable:
    """Compiles one Dynamo graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: as in ``torch.compile``.
        options: ours (:class:`svdq_compile.options.Options`) and any of Inductor's.

    Raises:
        OptionError: an unknown mode or option.
        FingerprintError: a quantised weight that does not look like its fingerprint.
        StrictError: ``strict`` and a linear that no fused kernel serves.
        TorchVersionError: torch is too old.
    """
    _compat.check_torch()
    ours, patches = parse_options(mode, options)
    report = insert_linear(gm)
    _log_report(report)
    if ours.strict:
        refuse_slower_paths(report)
    previous = patches.get("post_grad_custom_pre_pass", _compat.inductor_config.post_grad_custom_pre_pass)
    patches["post_grad_custom_pre_pass"] = SourceKeyed(previous, len(report.matched))
    return _compat.compile_fx(gm, list(example_inputs), config_patches=patches)


parse_options = options.parse
svdq.reset = _compat.reset_cudagraph_trees


def refuse_slower_paths(report: Report) -> None:
    """Raises StrictError unless every linear of a graph runs on a fused kernel."""
    slower = [(m, c) for m in report.matched if not (c := select(m.fingerprint, m.device)).fused]
    if slower:
        lines = sorted({f"  {m.fingerprint.spec.describe()} on {m.device}: {c.kernel} ({c.reason})" for m, c in slower})
        raise StrictError(f"strict: {len(slower)} linears would take a slower path\n" + "\n".join(lines))


def _log_report(report: Report) -> None:
    log.info("%s", report.summary().splitlines()[0])
    for match in report.matched:
        choice = select(match.fingerprint, match.device)
        log.debug("%s: %s -> %s (%s)", match.node, match.fingerprint.spec.describe(), choice.kernel, choice.reason)
