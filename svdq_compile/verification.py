"""``verify``: how far a quantised model is from the one it was made from, linear by linear and as a whole."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, OptionError, ShapeError, UnknownLinearError
from .model.bind import unwrap
from .model.load import device_of
from .model.resident import Resident, resident
from .ops.weight import SVDQWeight
from .quality.metrics import decibels, powers
from .quality.plain import finite_or_none

log = logging.getLogger(__name__)

Sums = dict[str, tuple[torch.Tensor, ...]]
"""Name -> sums of squares of what was expected and of the error."""

SAME_MODEL = "compare a checkpoint with the model it was quantised from"


@dataclasses.dataclass(frozen=True)
class Row:
    """One linear, or the whole model.

    Args:
        name: of the linear.
        format: of its weight; ``dense`` if it is not quantised.
        error: ``||y - y_ref|| / ||y_ref||``.
        sqnr: the same in dB, ``10 * log10(||y_ref||^2 / ||y_ref - y||^2)``.
    """

    name: str
    format: str
    error: float
    sqnr: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """SQNR in dB of several linears: their name with ``*`` for the block, how many, least, median and most."""

    name: str
    count: int
    worst: float
    median: float
    best: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """Errors of a model against its reference. ``str()`` is a table, worst first.

    Args:
        rows: the linears in the model's order, each fed the reference's own input of that linear.
        model: the whole model, where errors of all linears add up.
        resident: storage and bytes of the model.
        reference_resident: those of its reference.
    """

    rows: tuple[Row, ...]
    model: Row
    resident: Resident
    reference_resident: Resident

    @property
    def worst_first(self) -> tuple[Row, ...]:
        """The rows by falling error; NaN counts as worst."""
        return tuple(sorted(self.rows, key=lambda row: -math.inf if math.isnan(row.error) else -row.error))

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """All quantised linears, then those of each name; all linears where none is quantised."""
        rows = [row for row in self.rows if row.format != "dense"] or self.rows
        groups: dict[str, list[Row]] = {"all": list(rows)}
        for row in rows:
            groups.setdefault(re.sub(r"\.\d+\.", ".*.", row.name, count=1), []).append(row)
        return tuple(_summary(name, [row.sqnr for row in group]) for name, group in groups.items())

    def to_dict(self) -> dict:
        """Plain data for JSON; NaN and infinity become None."""
        return {
            "model": finite_or_none(dataclasses.asdict(self.model)),
            "summaries": [finite_or_none(dataclasses.asdict(row)) for row in self.summaries],
            "linears": [finite_or_none(dataclasses.asdict(row)) for row in self.rows],
            "resident": dataclasses.asdict(self.resident),
            "reference_resident": dataclasses.asdict(self.reference_resident),
        }

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [44])
        lines = [f"{'layer':{width}} {'format':10} {'error':>10} {'SQNR dB':>8}"]
        shown = (self.model, *(row for row in self.worst_first if row.error != 0))
        lines += [f"{r.name:{width}} {r.format:10} {r.error:10.3e} {r.sqnr:8.2f}" for r in shown]
        same = sum(row.error == 0 for row in self.rows)
        lines += [f"{same} more without any difference"] if same else []
        return "\n".join([*lines, f"model: {self.resident}", f"reference: {self.reference_resident}"])


def verify(
    model: nn.Module,
    reference: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    layers: str = "*",
) -> Verification:
    """Compares two models linear by linear and as a whole.

    Every linear of ``model`` gets the input that the reference's linear of the same name gets, so its
    error is its own. Linears are compared while the reference runs, one activation at a time.

    Args:
        model: the quantised model.
        reference: the model it was made from, on the same device and in the same dtype.
        inputs: keyword arguments of both models' ``forward``, or of several calls, whose squares add up;
            :func:`random_inputs` makes some, :class:`svdq_compile.DenoisingRun` keeps those of a denoising run.
        layers: glob of the linears to compare.

    Returns:
        Error and SQNR of each linear that ran and of the whole model, and the bytes of both; ``str()`` is a table.

    Raises:
        UnknownLinearError: one of the models has a linear the other has not.
        ShapeError: a linear has another size in the other model.
        OptionError: no linear has a name like ``layers``, or there are no inputs.
    """
    model, reference = unwrap(model), unwrap(reference)
    pairs = _pairs(model, reference)
    chosen = {name: pair for name, pair in pairs.items() if fnmatch.fnmatchcase(name, layers)}
    if not chosen:
        raise OptionError(f"no linear of {type(reference).__name__} matches {layers!r}")
    calls = [inputs] if isinstance(inputs, Mapping) else inputs
    if not calls:
        raise OptionError("there are no inputs to compare the models on")
    sums: Sums = {}
    hooks = [pair[1].register_forward_hook(_compare(name, pair[0], sums)) for name, pair in chosen.items()]
    try:
        with torch.no_grad():
            expected = [_first(reference(**call)) for call in calls]
    finally:
        for hook in hooks:
            hook.remove()
    whole: Sums = {}
    with torch.no_grad():
        for call, y in zip(calls, expected):
            _add(whole, "whole model", powers(_first(model(**call)), y))
    unreached = [name for name in chosen if name not in sums]
    if unreached:
        log.warning("%d linears did not run on these inputs, %s first", len(unreached), unreached[0])
    rows = (_row(name, _format(pair[0]), sums) for name, pair in chosen.items() if name in sums)
    return Verification(tuple(rows), _row("whole model", "", whole), resident(model), resident(reference))


def random_inputs(model: nn.Module, *, tokens: int = 64, seed: int = 0) -> dict[str, Any]:
    """Seeded standard normal inputs for a Qwen-Image transformer, in its dtype and on its device.

    Args:
        model: the transformer.
        tokens: number of image tokens, as square a picture as the number allows; text tokens are as many.
        seed: the same seed gives the same numbers on every device.

    Raises:
        ConfigError: some other kind of model.
    """
    inner = unwrap(model)
    config = dict(getattr(inner, "config", {}))
    if not {"in_channels", "joint_attention_dim", "axes_dims_rope"} <= config.keys():
        raise ConfigError(
            "random inputs are known for Qwen-Image transformers only",
            found=type(inner).__name__,
            hint="call svdq_compile.verification.verify with inputs of the model's own",
        )
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    generator = torch.Generator().manual_seed(seed)
    place = {"device": device_of(inner), "dtype": inner.dtype}
    inputs = {
        "hidden_states": torch.randn(1, tokens, config["in_channels"], generator=generator).to(**place),
        "encoder_hidden_states": torch.randn(1, tokens, config["joint_attention_dim"], generator=generator).to(**place),
        "timestep": torch.full((1,), 0.5, **place),
        "img_shapes": [[(1, height, tokens // height)]],
        "return_dict": False,
    }
    if config.get("use_additional_t_cond"):
        inputs["additional_t_cond"] = torch.zeros(1, dtype=torch.long, device=place["device"])
    return inputs


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _pairs(model: nn.Module, reference: nn.Module) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """The linears of both models by name, in the reference's order."""
    ours, theirs = _linears(model), _linears(reference)
    for name in ours.keys() ^ theirs.keys():
        where = "reference" if name in ours else "model"
        raise UnknownLinearError(f"the {where} has no such linear", key=name, hint=SAME_MODEL)
    for name, linear in theirs.items():
        found, needed = (f"{x.in_features} -> {x.out_features}" for x in (ours[name], linear))
        if found != needed:
            raise ShapeError(
                "the reference's linear has another size",
                key=name,
                found=found,
                needed=needed,
                hint=SAME_MODEL,
            )
    return {name: (ours[name], linear) for name, linear in theirs.items()}


def _compare(name: str, linear: nn.Linear, sums: Sums):
    """A forward hook that adds up the squares of the output and of the error."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        (x,) = args
        # Not linear(x): in a model compared with itself that would run this hook again.
        _add(sums, name, powers(linear.forward(x), output))

    return hook


def _add(sums: Sums, name: str, new: Sequence[torch.Tensor]) -> None:
    sums[name] = tuple(a + b for a, b in zip(sums[name], new)) if name in sums else tuple(new)


def _row(name: str, format: str, sums: Sums) -> Row:
    signal, noise = (float(power) for power in sums[name])
    error = 0.0 if noise == 0 else math.sqrt(noise / signal) if signal != 0 else math.inf
    return Row(name, format, error, decibels(signal, noise))


def _summary(name: str, sqnrs: list[float]) -> Summary:
    # NaN has no order; here it is as bad as can be.
    ordered = sorted(-math.inf if math.isnan(sqnr) else sqnr for sqnr in sqnrs)
    return Summary(name, len(ordered), ordered[0], statistics.median(ordered), ordered[-1])


def _format(linear: nn.Linear) -> str:
    return str(linear.weight.spec.format) if isinstance(linear.weight, SVDQWeight) else "dense"


def _first(output: Any) -> torch.Tensor:
    """The tensor a model returned, alone, in a tuple or in diffusers' output class."""
    return output if isinstance(output, torch.Tensor) else output[0]
