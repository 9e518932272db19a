"""What a captured model has captured, and what it has not."""

from __future__ import annotations

import dataclasses

from ..model.resident import size_text


@dataclasses.dataclass(frozen=True)
class ShapeReport:
    """One captured graph.

    Args:
        arguments: what it was captured for.
        input_nbytes: bytes of its own copies of the inputs.
        pool_nbytes: bytes by which its capture made the shared pool grow; later ones use them as well.
        replays: calls it has served.
    """

    arguments: str
    input_nbytes: int
    pool_nbytes: int
    replays: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a captured model holds now. ``str()`` is a table.

    Args:
        shapes: the graphs, least recently used first.
        max_shapes: how many there may be.
        pool_nbytes: bytes of the pool all graphs share.
        evicted: graphs that have been given up for others.
        uncaptured: why calls ran uncaptured -> how many did.
    """

    shapes: tuple[ShapeReport, ...]
    max_shapes: int
    pool_nbytes: int
    evicted: int
    uncaptured: dict[str, int]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = f"{len(self.shapes)} of {self.max_shapes} shapes captured, pool {size_text(self.pool_nbytes)}"
        lines = [f"{head}, {self.evicted} evicted"]
        for shape in self.shapes:
            sizes = f"{size_text(shape.input_nbytes)} inputs, {size_text(shape.pool_nbytes)} of pool"
            lines.append(f"  {shape.replays} replays, {sizes}: {shape.arguments}")
        lines += [f"  {count} calls uncaptured: {reason}" for reason, count in self.uncaptured.items()]
        return "\n".join(lines)
