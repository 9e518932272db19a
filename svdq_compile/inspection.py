"""``inspect``: what a checkpoint holds, from its headers alone. Needs no torch, no GPU and no time."""

from __future__ import annotations

import collections
import dataclasses
import os

from .checkpoint.manifest import Manifest, read_manifest
from .spec import Format


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint's contents. ``str()`` is the table the command line prints.

    Args:
        manifest: every tensor, sorted into quantised linears and dense tensors.
    """

    manifest: Manifest

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.manifest.warnings

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        m = self.manifest
        return {
            "folder": str(m.folder),
            "model": m.config.get("_class_name"),
            "quant_algo": (m.quantization_config or {}).get("quant_algo"),
            "dtype": m.dtype,
            "nbytes": m.nbytes,
            "linears": [
                {
                    "name": x.name,
                    "format": str(x.spec.format),
                    "in_features": x.spec.in_features,
                    "out_features": x.spec.out_features,
                    "rank": x.spec.rank,
                    "group_size": x.spec.group_size,
                    "dtype": x.spec.dtype,
                    "bias": x.has_bias,
                    "smooth": x.spec.smooth,
                    "dynamic": x.spec.dynamic,
                    "nbytes": x.nbytes,
                    "why": x.why,
                }
                for x in m.linears.values()
            ],
            "dense": [
                {"key": k, "dtype": i.dtype, "shape": list(i.shape), "nbytes": i.nbytes} for k, i in m.dense.items()
            ],
            "warnings": list(m.warnings),
        }

    def __str__(self) -> str:
        m = self.manifest
        algo = (m.quantization_config or {}).get("quant_algo", "unquantised")
        lines = [
            f"{m.folder}",
            f"{m.config.get('_class_name', 'unknown model')}, {algo}, {m.dtype}, {m.nbytes / 1e9:.3f} GB",
            "",
            f"{'layer':44} {'format':10} {'in -> out':>16} {'rank':>5} {'count':>6} {'MB':>10}",
        ]
        roles: dict[tuple, list[int]] = collections.OrderedDict()
        for x in m.linears.values():
            s = x.spec
            roles.setdefault((_role(x.name), str(s.format), s.in_features, s.out_features, s.rank), []).append(x.nbytes)
        for (role, format, k, n, rank), sizes in roles.items():
            shown = str(rank) if format == Format.NVFP4_SVD else "-"
            lines.append(
                f"{role:44} {format:10} {f'{k} -> {n}':>16} {shown:>5} {len(sizes):6} {sum(sizes) / 1e6:10.2f}"
            )
        dense = sum(info.nbytes for info in m.dense.values())
        lines.append(f"{'everything else':44} {'dense':10} {'':>16} {'':>5} {len(m.dense):6} {dense / 1e6:10.2f}")
        lines += [f"warning: {warning}" for warning in m.warnings]
        return "\n".join(lines)


def _role(name: str) -> str:
    """A layer's name with its block number blanked."""
    head, *rest = name.split(".")
    return ".".join([head, "*", *rest[1:]]) if rest and rest[0].isdigit() else name


def inspect(path: str | os.PathLike[str], *, revision: str | None = None) -> Inspection:
    """What a checkpoint holds, from headers and config alone.

    Args:
        path: transformer folder, pipeline folder, ``.safetensors`` file or Hub id.
        revision: Hub branch, tag or commit.

    Returns:
        Every tensor, sorted into quantised linears and dense tensors; ``str()`` is a table.

    Raises:
        CheckpointError: the files contradict each other or cannot be read.
    """
    return Inspection(read_manifest(path, revision=revision))
