"""Calibrate a model with NVIDIA ModelOpt and write the checkpoint with ModelOpt's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingPackageError, QuantizeError
from ..model.load import quantised_linears
from ..spec import GROUP_SIZE, Format
from .fake_quant import INSTALL, cpu_nvfp4
from .recipes import BLOCKS, Recipe, quant_config

log = logging.getLogger(__name__)

PASSES = {Format.NVFP4_SVD: 3, Format.NVFP4: 1, Format.FP8: 1}
"""How often ModelOpt calls the calibration loop: svdquant collects, searches scales and calibrates again."""


def export(
    model: torch.nn.Module,
    forward_loop: Callable[[torch.nn.Module], Any],
    output: str | os.PathLike[str],
    recipe: Recipe,
    *,
    seed: int = 0,
    copy: bool = True,
) -> Path:
    """Quantise a model with ModelOpt and write its checkpoint: ``config.json`` and safetensors.

    The same model, data and seed give the same bytes. The random state of torch, NumPy and ``random`` is left
    as it was.

    Args:
        model: a diffusers transformer with ``transformer_blocks``, on any device, in the dtype to export.
        forward_loop: runs calibration inputs through the model it is given; called up to three times.
        output: folder to write into; created if need be.
        recipe: what to quantise and how.
        seed: seed of every random number that is drawn while ``forward_loop`` and ModelOpt run.
        copy: work on a copy, which needs the model's memory a second time. Without it ModelOpt changes the model
            itself, which is of no further use.

    Returns:
        ``output``.

    Raises:
        MissingPackageError: ModelOpt or onnx is not installed.
        QuantizeError: the model has no blocks, too few of them, or a linear that is quantised already or that NVFP4
            cannot store; or ``forward_loop`` leaves a linear without input. Nothing is written then.
    """
    # Importing ModelOpt draws random numbers too.
    with _kept_random_state():
        mtq, export_hf_checkpoint = _modelopt()
        linears = _check(model, recipe)
        config = quant_config(recipe, len(getattr(model, BLOCKS)))
        output = Path(output)
        worked_on = (deepcopy(model) if copy else model).eval()
        loop = _Loop(forward_loop, PASSES[recipe.format], linears)
        with cpu_nvfp4(), _complete_dummy_inputs(), _prints_to_log(), torch.no_grad(), loop:
            _seed(seed)
            mtq.quantize(worked_on, config, loop)
            export_hf_checkpoint(worked_on, export_dir=output)
    return output


def _modelopt() -> tuple[Any, Callable[..., None]]:
    """``modelopt.torch.quantization`` and ModelOpt's exporter, or MissingPackageError."""
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise MissingPackageError("nvidia-modelopt", "quantising with ModelOpt", INSTALL) from error
    # Without onnx ModelOpt leaves out its diffusers plugin with no more than a warning.
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("onnx", "quantising with ModelOpt", INSTALL) from error
    return mtq, export_hf_checkpoint


def _check(model: torch.nn.Module, recipe: Recipe) -> list[str]:
    """Names of the linears to be quantised, after making sure that every one can be stored."""
    from modelopt.torch.quantization.utils import is_quantized

    blocks = getattr(model, BLOCKS, None)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise QuantizeError(f"{type(model).__name__} has no {BLOCKS}; give the pipeline's transformer")
    if quantised_linears(model) or is_quantized(model):
        raise QuantizeError(f"this {type(model).__name__} is quantised already; give the unquantised one")
    linears = []
    for index in recipe.quantized_blocks(len(blocks)):
        for name, module in blocks[index].named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            if module.in_features % GROUP_SIZE and recipe.format is not Format.FP8:
                raise QuantizeError(
                    f"{BLOCKS}.{index}.{name} has {module.in_features} inputs; "
                    f"{recipe.format} needs a multiple of {GROUP_SIZE}"
                )
            linears.append(f"{BLOCKS}.{index}.{name}")
    return linears


class _Loop:
    """The caller's calibration loop with a progress bar that counts forward passes of the model.

    What the caller prints goes where it went when this object was made.

    Args:
        forward_loop: the caller's loop.
        passes: how often ModelOpt will call it.
        linears: names of those that every call must run; without input they get no activation scale.
    """

    def __init__(self, forward_loop: Callable[[torch.nn.Module], Any], passes: int, linears: list[str]) -> None:
        self.forward_loop = forward_loop
        self.passes = passes
        self.linears = linears
        self.stdout = sys.stdout
        self.done = 0
        self.forwards = 0

    def __enter__(self) -> _Loop:
        from diffusers.utils.logging import tqdm

        self.bar = tqdm(desc="Calibrating", unit="forward")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, model: torch.nn.Module) -> None:
        before, ran = self.forwards, set()
        hooks = [model.register_forward_hook(self._count)]
        hooks += [
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
            for name in self.linears
        ]
        try:
            with contextlib.redirect_stdout(self.stdout):
                self.forward_loop(model)
        finally:
            for hook in hooks:
                hook.remove()
        self.done += 1
        idle = [name for name in self.linears if name not in ran]
        if idle:
            raise QuantizeError(
                f"calibration left {len(idle)} of {len(self.linears)} linears without input, first {idle[0]}\n"
                f"  found:  {self.forwards - before} forward passes of the model in call {self.done} of forward_loop\n"
                "  needed: every call runs inputs through the model it is given\n"
                "  hint:   put that model into the pipeline (pipe.transformer = model), and begin anew with the data "
                "on every call"
            )
        if self.done == 1:
            self.bar.total = self.forwards * self.passes
            self.bar.refresh()

    def _count(self, *_: object) -> None:
        # Not read off the bar: a disabled one has no numbers.
        self.forwards += 1
        self.bar.update()


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Put the random states of torch, NumPy and ``random`` back afterwards."""
    import numpy

    numpy_state, python_state = numpy.random.get_state(), random.getstate()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            numpy.random.set_state(numpy_state)
            random.setstate(python_state)


def _seed(seed: int) -> None:
    """Seed torch, NumPy and ``random``."""
    import numpy

    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def _complete_dummy_inputs() -> Iterator[None]:
    """Give ModelOpt's exporter the input that ``use_additional_t_cond`` models (Qwen-Image-Layered) need."""
    from modelopt.torch.export import diffusers_utils

    original = diffusers_utils.generate_diffusion_dummy_inputs

    def complete(model, device, dtype):
        inputs = original(model, device, dtype)
        if inputs is not None and getattr(getattr(model, "config", None), "use_additional_t_cond", False):
            batch = len(inputs["hidden_states"])
            inputs["additional_t_cond"] = torch.zeros(batch, dtype=torch.long, device=device)
        return inputs

    diffusers_utils.generate_diffusion_dummy_inputs = complete
    try:
        yield
    finally:
        diffusers_utils.generate_diffusion_dummy_inputs = original


class _LogWriter(io.TextIOBase):
    """A text stream whose lines go to the log at level INFO."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                log.info("%s", line.rstrip())
        return len(text)


@contextlib.contextmanager
def _prints_to_log() -> Iterator[None]:
    """Send what ModelOpt prints to the log."""
    with contextlib.redirect_stdout(_LogWriter()):
        yield
