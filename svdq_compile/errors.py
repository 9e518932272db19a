"""Every failure a user can see, one class each.

A message says which layer or file, what was found, what was needed, and what to do. Raise these with keyword
arguments; the text is put together here, so that all of them read alike.
"""

from __future__ import annotations

import os


class SvdqError(Exception):
    """Base class of every error this package raises on purpose."""


class CheckpointError(SvdqError, ValueError):
    """A checkpoint cannot be used as it is.

    Args:
        what: one clause that says what is wrong.
        file: the file or folder at fault.
        key: the tensor key or config entry at fault.
        found: what the checkpoint holds.
        needed: what it would have to hold.
        hint: what the reader can do.
    """

    hint = ""

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        found: object = None,
        needed: object = None,
        hint: str = "",
    ) -> None:
        self.what = what
        self.file = None if file is None else os.fspath(file)
        self.key = key
        self.found = found
        self.needed = needed
        self.hint = hint or type(self).hint
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what]
        for label, value in (
            ("file", self.file),
            ("key", self.key),
            ("found", self.found),
            ("needed", self.needed),
            ("hint", self.hint or None),
        ):
            if value is not None:
                lines.append(f"  {label + ':':8}{value}")
        return "\n".join(lines)


class CheckpointNotFoundError(CheckpointError):
    """No checkpoint at the given path or Hub id."""

    hint = "give a transformer folder, a pipeline folder, a .safetensors file or a Hub id"


class UnsafeFileError(CheckpointError):
    """Only pickle files are there; they are never read."""

    hint = "export safetensors files; pickle can run code and is refused"


class UnsafePathError(CheckpointError):
    """The shard index points outside the checkpoint's folder."""

    hint = "shards must lie in the index file's own folder"


class TruncatedFileError(CheckpointError):
    """A file ends before the data its header promises."""

    hint = "the download or copy was cut off; fetch the file again"


class HeaderError(CheckpointError):
    """A safetensors header contradicts itself or its file."""

    hint = "the file is damaged or was not written by safetensors; export it again"


class ShardIndexError(CheckpointError):
    """The shard index and the shards disagree."""

    hint = "the folder mixes files of different exports; fetch or export all of them again"


class ConfigError(CheckpointError):
    """``config.json`` is missing, unreadable, or describes something else."""

    hint = "point at the folder that holds the transformer's own config.json"


class UnknownQuantAlgoError(ConfigError):
    """The checkpoint is quantised in a way this package does not read."""

    hint = "readable: quant_method 'modelopt' with quant_algo NVFP4_SVD, NVFP4 or FP8"


class SwizzledScalesError(CheckpointError):
    """Block scales were exported in a tiled layout whose shape looks like the plain one."""

    hint = "export again without enable_swizzle_layout / padding_strategy"


class ShapeError(CheckpointError):
    """A tensor has another shape than its linear needs."""

    hint = "the file belongs to another model or was edited; export it again"


class GroupSizeError(ShapeError):
    """``in_features`` is not a multiple of the block-scale group."""

    hint = "NVFP4 stores one scale per 16 inputs; keep such a linear unquantised when exporting"


class DtypeError(CheckpointError):
    """A tensor has another dtype than its role needs."""

    hint = "the file was converted after the export; use the exported one"


class MissingKeyError(CheckpointError):
    """A tensor the checkpoint must hold is not there."""

    hint = "the file is incomplete; without this tensor the result would be wrong"


class LeftoverKeyError(CheckpointError):
    """The checkpoint holds a tensor nothing would use."""

    hint = "dropping a tensor silently yields wrong images, so nothing is loaded"


class LoraPairError(MissingKeyError):
    """A low-rank branch is incomplete."""

    hint = "svdquant_lora_a, svdquant_lora_b and pre_quant_scale come together"


class ScaleError(CheckpointError):
    """A scale is NaN, infinite or negative."""

    hint = "calibration failed for this layer; export again"


class ZeroScaleError(ScaleError):
    """A per-tensor scale is zero."""

    hint = "the layer was never calibrated, or its weight is all zero; export again"


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""

    hint = "the model overflowed before or during the export"


class UnknownLinearError(CheckpointError):
    """The checkpoint quantises a linear that the model does not have."""

    hint = "the checkpoint belongs to another architecture; compare config.json with the model's config"


class SaveError(CheckpointError):
    """A model cannot be written as a checkpoint."""

    hint = "save_checkpoint writes models that load_transformer, load_into or quantize produced"


class ModelError(SvdqError, TypeError):
    """Something other than a model was given for one, such as a pipeline."""

    def __init__(self, given: object) -> None:
        advice = "give its .transformer" if hasattr(given, "transformer") else "give the transformer, a torch.nn.Module"
        super().__init__(f"{type(given).__name__} is no model\n  hint:   {advice}")


class QuantizeError(SvdqError, ValueError):
    """A model cannot be quantised as asked."""


class MissingPackageError(SvdqError, ImportError):
    """An optional package is needed for this and is not installed."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        super().__init__(f"{needed_for} needs the package {package!r}; install it with: {install}")


class DenseWeightError(SvdqError, NotImplementedError):
    """An operation would need the dense weight of a quantised linear."""

    def __init__(self, operation: str, spec: str, hint: str = "") -> None:
        super().__init__(
            f"{operation} needs the dense weight of a quantised linear ({spec}), which does not exist.\n"
            f"  hint:   {hint or 'use the linear as a layer (F.linear); it cannot be read, merged or re-scaled'}"
        )


class StorageError(SvdqError, ValueError):
    """There is no such storage, or a weight has given up by its storage what is asked of it."""

    def __init__(self, what: str, hint: str = "load the checkpoint with storage='packed'") -> None:
        super().__init__(f"{what}\n  hint:   {hint}")


class FingerprintError(SvdqError, RuntimeError):
    """A weight in a traced graph does not look the way its fingerprint says."""


class ShareError(SvdqError, RuntimeError):
    """A copy into a quantised weight would make it differ from others that compiled code computes together with it."""

    def __init__(self, part: str, share: str, spec: str) -> None:
        super().__init__(
            f"cannot copy another {part} into one of the weights {share} ({spec}), which have it in common.\n"
            "  hint:   load all of them at once with load_into"
        )


class StrictError(SvdqError, RuntimeError):
    """``strict=True`` and something would take a slower path."""


class CaptureError(SvdqError, RuntimeError):
    """A forward cannot be captured as a CUDA graph.

    Args:
        what: one clause that says what is wrong.
        found: what stands in the way.
        hint: what the reader can do.
    """

    hint = "Captured.report() counts the calls that run uncaptured, and says why"

    def __init__(self, what: str, *, found: str, hint: str = "") -> None:
        super().__init__(f"{what}\n  found:  {found}\n  hint:   {hint or type(self).hint}")


class OffloadError(CaptureError):
    """A model whose weights move between devices cannot be captured."""

    hint = "keep the transformer on the GPU (pipe.to('cuda'); packed weights are small), or do not capture it"


class OptionError(SvdqError, ValueError):
    """An option of ``torch.compile(backend="svdq")``, of a command or of a plan is unknown or has a bad value."""


class TorchVersionError(SvdqError, RuntimeError):
    """This torch is outside the supported range."""
