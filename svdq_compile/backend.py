"""The ``svdq`` backend of ``torch.compile``: our passes on Dynamo's graph, then Inductor.

Dynamo finds :func:`svdq` through the ``torch_dynamo_backends`` entry point; nothing needs to be imported first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from . import _compat, options
from .errors import StrictError
from .lowering.registry import active
from .lowering.select import select
from .ops.native import has_native_fp4
from .passes.base import Report, SourceKeyed
from .passes.pipeline import rewrite, wanted_settings
from .passes.split_weights import split_weights, splitting

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

    Returns:
        What computes the graph.

    Raises:
        OptionError: an unknown mode or option.
        FingerprintError: a quantised weight that does not look like its fingerprint.
        StrictError: ``strict`` and a linear that no fused kernel serves.
        TorchVersionError: torch is too old.
    """
    _compat.check_torch()
    _compat.allow_graphs_of_a_block()
    ours, patches = parse_options(mode, options)
    reports = rewrite(gm, ours.compute, ours.skipped)
    patches |= wanted_settings(reports, patches)
    report = reports["insert_linear"]
    _log_choices(report)
    for device in {match.device for match in report.matched}:
        # May run a kernel, which the lowering must not.
        has_native_fp4(device)
    if ours.strict:
        refuse_slower_paths(report)
    previous = patches.get("post_grad_custom_pre_pass", _compat.inductor_config.post_grad_custom_pre_pass)
    patches["post_grad_custom_pre_pass"] = SourceKeyed(previous, len(report.matched), ours.skipped)
    split, inputs, readers = split_weights(gm, example_inputs)
    with active():
        compiled = _compat.compile_fx(split, inputs, config_patches=patches)
    if any(match.device.type == "cuda" for match in report.matched):
        # Triton is there where a GPU is.
        from .lowering.launch import with_scratch

        compiled = with_scratch(compiled)
    return splitting(compiled, readers)


parse_options = options.parse
svdq.reset = _compat.reset_cudagraph_trees


def refuse_slower_paths(report: Report) -> None:
    """Raises StrictError unless our kernels compute every quantised linear of a graph."""
    slower = [(m, c) for m in report.matched if not (c := select(m.fingerprint, m.device, m.dtype)).fused]
    if slower:
        layers: dict[str, list[str]] = {}
        for m, c in slower:
            what = f"{m.fingerprint.spec.describe()} on {m.device}: {c.kernel} ({c.reason})"
            layers.setdefault(what, []).append(m.layer)
        lines = [f"  {what}: {_some_of(names)}" for what, names in sorted(layers.items())]
        hint = "  hint:   svdq_compile.explain(model) says what runs where; without strict it runs as said"
        raise StrictError("\n".join([f"strict: {len(slower)} linears would take a slower path", *lines, hint]))


def _some_of(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _log_choices(report: Report) -> None:
    for match in report.matched:
        choice = select(match.fingerprint, match.device, match.dtype)
        log.debug("%s: %s -> %s (%s)", match.node, match.fingerprint.spec.describe(), choice.kernel, choice.reason)
