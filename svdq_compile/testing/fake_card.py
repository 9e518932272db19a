"""What a GPU answers to those who ask about it: ``torch.cuda``, Dynamo and Inductor, Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch._dynamo import device_interface
from triton.backends.compiler import GPUTarget


@dataclasses.dataclass(frozen=True)
class Card:
    """What ``torch.cuda.get_device_properties`` tells of a GPU; sizes in bytes, clocks in kHz."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    max_threads_per_multi_processor: int
    clock_rate: int
    memory_clock_rate: int
    memory_bus_width: int
    shared_memory_per_block: int = 48 << 10
    max_threads_per_block: int = 1024
    regs_per_multiprocessor: int = 65536
    warp_size: int = 32
    is_integrated: bool = False
    is_multi_gpu_board: bool = False
    gcnArchName: str = ""


# Name, capability, SMs, memory, L2, shared memory per block and per SM, threads per SM, clocks, bus width.
CARDS = {
    (card.major, card.minor): card
    for card in (
        Card("NVIDIA A100", 8, 0, 108, 80 << 30, 40 << 20, 163 << 10, 164 << 10, 2048, 1410000, 1593000, 5120),
        Card("NVIDIA H200", 9, 0, 132, 141 << 30, 60 << 20, 227 << 10, 228 << 10, 2048, 1980000, 3201000, 6144),
        Card("NVIDIA B200", 10, 0, 148, 180 << 30, 126 << 20, 227 << 10, 228 << 10, 2048, 1965000, 3996000, 8192),
        Card("NVIDIA RTX 5090", 12, 0, 170, 32 << 30, 96 << 20, 99 << 10, 100 << 10, 1536, 2407000, 14001000, 512),
    )
}
"""Compute capability -> the card :func:`~svdq_compile.testing.fake_gpu.fake_gpu` pretends to be."""


def cuda_functions(card: Card) -> dict[str, Callable]:
    """Functions of ``torch.cuda`` as they are on a machine with this card."""
    state = torch.zeros(16, dtype=torch.uint8)

    def refuse() -> None:
        raise RuntimeError("fake GPU: something tried to use CUDA, such as autotuning among several choices")

    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: card,
        "get_device_capability": lambda device=None: (card.major, card.minor),
        "get_device_name": lambda device=None: card.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: True,
        "mem_get_info": lambda device=None: (card.total_memory, card.total_memory),
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda new_state, device="cuda": None,
        "_lazy_init": refuse,
    }


def interface(card: Card) -> type[device_interface.DeviceInterface]:
    """Dynamo's and Inductor's view of the card; what is not here asks ``torch.cuda``."""

    class FakeWorker:
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: card)

    class FakeCudaInterface(device_interface.CudaInterface):
        Worker = FakeWorker
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        exchange_device = staticmethod(lambda device: 0)
        maybe_exchange_device = staticmethod(lambda device: 0)
        device_count = staticmethod(lambda: 1)
        get_device_properties = staticmethod(lambda device=None: card)
        get_raw_stream = staticmethod(lambda device: 0)
        synchronize = staticmethod(lambda device=None: None)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)

    return FakeCudaInterface


def triton_driver(card: Card) -> SimpleNamespace:
    """Triton's active driver, as far as code generation asks it."""
    properties = {
        "max_shared_mem": card.shared_memory_per_block_optin,
        "max_num_regs": card.regs_per_multiprocessor,
        "multiprocessor_count": card.multi_processor_count,
        "warpSize": card.warp_size,
        "sm_clock_rate": card.clock_rate,
        "mem_clock_rate": card.memory_clock_rate,
        "mem_bus_width": card.memory_bus_width,
    }
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * card.major + card.minor, card.warp_size),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
