"""``explain``: per linear, what a model runs and why."""

from __future__ import annotations

import dataclasses

from torch import nn

from .lowering.select import select
from .model.bind import unwrap
from .ops.modes import resolve
from .ops.weight import SVDQWeight
from .passes.pipeline import PASSES


@dataclasses.dataclass(frozen=True)
class Row:
    """One linear: its name, format, sizes, storage, bytes on the device, implementation and the reason for it.

    ``compute`` is what ``auto`` means on that device. ``fused`` is None for an unquantised linear, which is not ours
    to fuse; its ``storage`` and ``compute`` are empty.
    """

    name: str
    format: str
    in_features: int
    out_features: int
    rank: int
    storage: str
    nbytes: int
    compute: str
    kernel: str
    fused: bool | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every linear of a model, in the model's order, and the graph passes ``backend="svdq"`` has.

    ``str()`` is a table that groups equal rows.
    """

    rows: tuple[Row, ...]

    @property
    def passes(self) -> dict[str, str]:
        """Name -> what it does, in the order they run."""
        return {each.name: each.does for each in PASSES}

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {"linears": [dataclasses.asdict(row) for row in self.rows], "passes": self.passes}

    def __str__(self) -> str:
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            key = (row.format, row.storage, row.compute, row.kernel, row.reason)
            groups.setdefault(key, []).append(row)
        lines = []
        for (format, storage, compute, kernel, reason), rows in groups.items():
            total = sum(row.nbytes for row in rows) / 1e6
            how = f", {storage}, compute {compute}" if compute else ""
            lines.append(f"{len(rows)} x {format}{how}: {kernel}, {total:.1f} MB ({reason})")
            shown = [f"{r.name} {r.in_features}->{r.out_features}" for r in rows[:3]]
            lines.append(f"    {', '.join(shown)}{', ...' if len(rows) > 3 else ''}")
        lines = lines or ["no linears"]
        return "\n".join([*lines, "passes:", *(f"    {name}: {does}" for name, does in self.passes.items())])


def explain(model: nn.Module) -> Explanation:
    """Says per linear of a model what computes it and why, whether compiled or not.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.
    """
    return Explanation(tuple(_row(name, m) for name, m in unwrap(model).named_modules() if isinstance(m, nn.Linear)))


def _row(name: str, module: nn.Linear) -> Row:
    weight = module.weight
    sizes = (module.in_features, module.out_features)
    if not isinstance(weight, SVDQWeight):
        nbytes = weight.numel() * weight.element_size()
        return Row(name, "dense", *sizes, 0, "", nbytes, "", "torch", None, f"unquantised, {weight.dtype}")
    choice = select(weight.fingerprint, weight.device)
    return Row(
        name,
        str(weight.spec.format),
        *sizes,
        weight.spec.rank,
        weight.spec.storage,
        weight.packed_nbytes(),
        resolve(weight.fingerprint.compute, weight.spec.format, weight.device),
        choice.kernel,
        choice.fused,
        choice.reason,
    )
