"""``verify``: how far a quantised model is from the one it was made from, linear by linear and as a whole."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, OptionError, ShapeError, UnknownLinearError
from .model.bind import unwrap
from .model.load import device_of
from .model.resident import Resident, resident
from .ops.weight import SVDQWeight

log = logging.getLogger(__name__)

SAME_MODEL = "compare a checkpoint with the model it was quantised from"


@dataclasses.dataclass(frozen=True)
class Row:
    """One linear, or the whole model: name, format, ``||y - y_ref|| / ||y_ref||``, and the same in dB."""

    name: str
    format: str
    error: float
    sqnr: float


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

    def to_dict(self) -> dict:
        """Plain data for JSON; NaN and infinity become None."""
        return {
            "model": _plain(self.model),
            "linears": [_plain(row) for row in self.rows],
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


def verify(model: nn.Module, reference: nn.Module, inputs: Mapping[str, Any], *, layers: str = "*") -> Verification:
    """Compares two models linear by linear and as a whole.

    Every linear of ``model`` gets the input that the reference's linear of the same name gets, so its
    error is its own. Linears are compared while the reference runs, one activation at a time.

    Args:
        model: the quantised model.
        reference: the model it was made from, on the same device and in the same dtype.
        inputs: keyword arguments of both models' ``forward``; :func:`random_inputs` makes some.
        layers: glob of the linears to compare.

    Raises:
        UnknownLinearError: one of the models has a linear the other has not.
        ShapeError: a linear has another size in the other model.
        OptionError: no linear has a name like ``layers``.
    """
    model, reference = unwrap(model), unwrap(reference)
    pairs = _pairs(model, reference)
    chosen = {name: pair for name, pair in pairs.items() if fnmatch.fnmatchcase(name, layers)}
    if not chosen:
        raise OptionError(f"no linear of {type(reference).__name__} matches {layers!r}")
    powers: dict[str, list[torch.Tensor]] = {}
    hooks = [pair[1].register_forward_hook(_compare(name, pair[0], powers)) for name, pair in chosen.items()]
    try:
        with torch.no_grad():
            expected = _first(reference(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        whole = _powers(_first(model(**inputs)), expected)
    unreached = [name for name in chosen if name not in powers]
    if unreached:
        log.warning("%d linears did not run on these inputs, %s first", len(unreached), unreached[0])
    rows = (_row(name, _format(chosen[name][0]), powers[name]) for name in chosen if name in powers)
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


def _compare(name: str, linear: nn.Linear, powers: dict[str, list[torch.Tensor]]):
    """A forward hook that adds up the squares of the error and of the output."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        (x,) = args
        # Not linear(x): in a model compared with itself that would run this hook again.
        new = _powers(linear.forward(x), output)
        powers[name] = [a + b for a, b in zip(powers[name], new)] if name in powers else new

    return hook


def _powers(y: torch.Tensor, expected: torch.Tensor) -> list[torch.Tensor]:
    """Sums of squares of the error and of what was expected."""
    wide = expected.double()
    return [(y.double() - wide).square().sum(), wide.square().sum()]


def _row(name: str, format: str, powers: list[torch.Tensor]) -> Row:
    noise, signal = (float(power) for power in powers)
    if noise == 0:
        return Row(name, format, 0.0, math.inf)
    if signal == 0:
        return Row(name, format, math.inf, -math.inf)
    ratio = signal / noise
    return Row(name, format, math.sqrt(noise / signal), 10 * math.log10(ratio) if ratio else -math.inf)


def _format(linear: nn.Linear) -> str:
    return str(linear.weight.spec.format) if isinstance(linear.weight, SVDQWeight) else "dense"


def _first(output: Any) -> torch.Tensor:
    """The tensor a model returned, alone, in a tuple or in diffusers' output class."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _plain(row: Row) -> dict:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in dataclasses.asdict(row).items()}
