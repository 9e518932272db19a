"""Inductor's CUDA code generation on a machine without a GPU, CPU-only builds of torch included.

    with fake_gpu((9, 0)):
        code = compile_on_fake_gpu(module, (x,), backend="svdq")

Parameters and inputs become fake CUDA tensors, Dynamo and Inductor run as they would on the card, and the source of
the wrapper is taken before anything is loaded or launched. :mod:`.generated` reads such a source.

What differs from a real card:

- ``F.scaled_dot_product_attention`` becomes the one operator a card would choose, already in Dynamo's graph, because
  torch cannot choose without a driver: flash attention for 16-bit tensors without a mask, memory-efficient attention
  otherwise.
- Whatever needs a measurement is off (padding of matrix products) or unavailable (autotuning among several choices).
- Constants on the device are not folded, because torch computes them there.
- Parameters and inputs do not require gradients; code is that of inference.

Private symbols of torch and Triton, besides the imports below: ``torch.cuda._lazy_init``, ``_exchange_device`` and
``_maybe_exchange_device``, ``FakeTensorMode.avoid_device_init``, ``GraphLowering.save_output_code``,
``CachingAutotuner._precompile_config``, ``triton.runtime.driver._active``, and
:data:`~svdq_compile.testing.fake_driver.GUARDS`. One that a newer torch lacks raises on entering :func:`fake_gpu`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch
import torch._dynamo
import torch._functorch.config
import triton
from torch import nn
from torch._dynamo import device_interface, trace_rules
from torch._inductor import codecache
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from .fake_card import CARDS, Card, cuda_functions, interface, triton_driver
from .fake_driver import attention, cuda_device_guard

CACHING_MODULES = (
    "torch.utils._triton",
    "torch._dynamo.debug_utils",
    "torch._inductor.utils",
    "torch._inductor.codegen.cuda.cuda_env",
)
"""Modules of torch whose ``functools`` caches hold answers about the GPU, and nothing that must happen only once."""

INDUCTOR_SETTINGS = {
    "compile_threads": 1,
    "fx_graph_cache": False,
    "fx_graph_remote_cache": False,
    "joint_graph_constant_folding": False,
    "shape_padding": False,
    "use_static_triton_launcher": False,
}
"""No worker processes, which would look for the GPU themselves; no caches; nothing that runs on the device; and
Triton's own objects for compiled kernels."""

_active: list[Card] = []


@contextlib.contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0), **properties: object) -> Iterator[Card]:
    """Makes torch, Inductor and Triton see one GPU, ``cuda:0``; fake tensors only, nothing can run on it.

    Holds for all threads of the process. May be nested. On leaving, everything replaced is put back, and the caches
    that depend on the GPU are empty.

    Args:
        capability: a key of :data:`~svdq_compile.testing.fake_card.CARDS`.
        properties: fields of :class:`~svdq_compile.testing.fake_card.Card` that differ from that card's.

    Raises:
        ValueError: there is no card of this capability.
        RuntimeError: inside, something tried to use CUDA.
    """
    if capability not in CARDS:
        raise ValueError(f"capability {capability}: choose one of {', '.join(map(str, CARDS))}")
    card = dataclasses.replace(CARDS[capability], **properties)
    if not _active:
        _initialise_torch()
    with contextlib.ExitStack() as stack:
        stack.callback(_clear_caches)
        for patch in _patches(card):
            stack.enter_context(patch)
        _clear_caches()
        _active.append(card)
        stack.callback(_active.pop)
        yield card


def generated_code(compile_call: Callable[[], object]) -> str:
    """Source of the wrapper Inductor generates for the first graph a call compiles; the call ends there.

    Args:
        compile_call: compiles under :func:`fake_gpu`, for example by calling a compiled function with fake CUDA
            tensors under their ``FakeTensorMode``.

    Raises:
        RuntimeError: the call compiled nothing.
    """

    def stop(code: str) -> None:
        raise _Generated(code)

    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(stop)):
        try:
            compile_call()
        except _Generated as generated:
            return generated.code
    raise RuntimeError("Inductor generated no code")


def compile_on_fake_gpu(
    module: nn.Module,
    example_inputs: tuple | Mapping[str, object],
    *,
    backend: str | Callable = "svdq",
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **backend_arguments: object,
) -> str:
    """Compiles a copy of a module on the fake GPU. Dynamo forgets what it compiled before.

    Args:
        module: on CPU or meta; its parameters and buffers move, quantised weights included, and are not copied.
            Tensors it holds otherwise stay where they are, as in ``module.to``.
        example_inputs: arguments of the call, as a tuple, or as a mapping of keywords; every tensor in them moves.
        backend: name of a Dynamo backend, or the backend itself.
        dynamic: as in ``torch.compile``.
        fullgraph: as in ``torch.compile``.
        backend_arguments: the backend's own, for example ``options=`` and ``mode=`` of ``svdq``.

    Returns:
        The wrappers of all graphs in the order they were compiled, one behind the other.

    Raises:
        RuntimeError: outside of :func:`fake_gpu`, or nothing was compiled.
        Exception: what the backend or ``torch.compile`` raise.
    """
    if not _active:
        raise RuntimeError("compile_on_fake_gpu works inside of fake_gpu() only")
    compiler = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    codes: list[str] = []

    def capture(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        codes.append(generated_code(lambda: compiler(gm, inputs, **backend_arguments)))
        # Runs on fake tensors, so that a graph behind a graph break is compiled too.
        return gm.forward

    torch._dynamo.reset()
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        moved = _fake_copy(module, mode)
        with mode, torch.no_grad():
            inputs = tree_map_only(torch.Tensor, _on_gpu, example_inputs)
            args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
            torch.compile(moved, backend=capture, dynamic=dynamic, fullgraph=fullgraph)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    if not codes:
        raise RuntimeError("torch.compile found nothing to compile")
    return "\n".join(codes)


class _Generated(BaseException):
    """Carries the source past everything that handles ordinary errors."""

    def __init__(self, code: str) -> None:
        self.code = code


def _fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fake from the start: ``deepcopy`` finds them among its copies."""
    with mode, torch.no_grad():
        moved = {id(tensor): _on_gpu(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, moved)


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor of the same kind, in the active FakeTensorMode."""
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: _on_gpu(getattr(tensor, name)) for name in names}
        moved = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    else:
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _initialise_torch() -> None:
    """Has torch do what it does once in a process, and would do wrongly on a fake GPU."""
    # Both read torch.cuda and keep what they find.
    trace_rules.get_torch_obj_rule_map()
    device_interface.get_interface_for_device("cpu")
    # Patterns are traced with tensors on the device given, and cannot be registered for a second device.
    if not joint_graph.lazy_init.cache_info().currsize:
        joint_graph.lazy_init(torch.device("cpu"))


def _patches(card: Card) -> Iterator[contextlib.AbstractContextManager]:
    cuda = interface(card)
    yield mock.patch.dict(device_interface.device_interfaces, {"cuda": cuda, "cuda:0": cuda})
    for name, answer in cuda_functions(card).items():
        yield mock.patch.object(torch.cuda, name, answer)
    # Streams and their guards are objects of the driver.
    yield mock.patch.object(torch.accelerator, "is_available", _nothing)
    # Fake tensors then never touch a CUDA device, and their operators' device guards do nothing.
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", True)
    yield mock.patch.object(fake_tensor, "init_gpu_context", _nothing)
    yield cuda_device_guard()
    # Tracing computes with constants of up to so many elements, on the device if that is where they go.
    yield mock.patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", -1)
    yield mock.patch.object(nn.functional, "scaled_dot_product_attention", attention())
    yield mock.patch.object(joint_graph, "lazy_init", _nothing)
    yield mock.patch.object(triton_helpers, "set_driver_to_gpu", _nothing)
    yield mock.patch.object(triton.runtime.driver, "_active", triton_driver(card))
    yield inductor_config.patch(INDUCTOR_SETTINGS)
    yield torch._functorch.config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False)


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _clear_caches() -> None:
    for cached in gpu_caches():
        cached.cache_clear()


def gpu_caches() -> list[Callable]:
    """The caches of torch that depend on which GPU there is."""
    found = [DeviceProperties.create, codecache.CacheBase.get_system, codecache.CacheBase.get_local_cache_path]
    for name in CACHING_MODULES:
        members = vars(sys.modules[name]).values() if name in sys.modules else ()
        found += (m for m in members if hasattr(m, "cache_clear") and m.__module__ == name)
    return found
