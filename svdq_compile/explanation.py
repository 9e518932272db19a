"""``explain``: per linear, what a model runs and why."""

from __future__ import annotations

import collections
import dataclasses

from torch import nn

from .lowering.select import select
from .model.bind import unwrap
from .model.share import Candidate, examine
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
class Group:
    """Linears of one module that read one tensor. ``str()`` names no block.

    Args:
        owner: what the names begin with: the module they are part of.
        names: full names of the linears.
        shared: whether their activation's side is computed once for all.
        reason: why not, empty if it is.
    """

    owner: str
    names: tuple[str, ...]
    shared: bool
    reason: str

    def __str__(self) -> str:
        members = "+".join(name.removeprefix(self.owner) for name in self.names)
        if self.shared:
            return f"{members}: grouped, their input_scale, pre_quant_scale and lora_down are equal"
        return f"{members}: apart, {self.reason.replace(self.owner, '')}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every linear of a model, in the model's order, which of them share, and the passes of ``backend="svdq"``.

    ``str()`` is a table that groups equal rows.

    Args:
        rows: one per linear.
        groups: linears that read the same tensor by the model's design; those that share are one
            ``svdq::linear_group``, or part of one ``svdq::joint_heads``, in compiled code.
    """

    rows: tuple[Row, ...]
    groups: tuple[Group, ...] = ()

    @property
    def passes(self) -> dict[str, str]:
        """Name -> what it does, in the order they run."""
        return {each.name: each.does for each in PASSES}

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "linears": [dataclasses.asdict(row) for row in self.rows],
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "passes": self.passes,
        }

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
        counts = collections.Counter(str(group) for group in self.groups)
        lines += [f"{count} x {text}" for text, count in counts.items()]
        return "\n".join([*lines, "passes:", *(f"    {name}: {does}" for name, does in self.passes.items())])


def explain(model: nn.Module) -> Explanation:
    """Says per linear of a model what computes it and why, whether compiled or not.

    Args:
        model: the model, or what ``torch.compile(model)`` returned.

    Returns:
        Every linear with what computes it, which of them share, and the graph passes; ``str()`` is a table.
    """
    linears = {name: m for name, m in unwrap(model).named_modules() if isinstance(m, nn.Linear)}
    weights = {name: m.weight for name, m in linears.items() if isinstance(m.weight, SVDQWeight)}
    groups = tuple(_group(weights, candidate) for candidate in examine(weights))
    return Explanation(tuple(_row(name, m) for name, m in linears.items()), groups)


def _group(weights: dict[str, SVDQWeight], found: Candidate) -> Group:
    marked = not found.reason and all(weights[name].fingerprint.share for name in found.names)
    reason = found.reason or ("" if marked else "they could share, but were not loaded together: use load_into")
    return Group(found.owner, found.names, marked, reason)


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
