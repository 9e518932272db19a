"""Kernels get the memory they ask for wherever a compiled graph is called."""

import contextvars
import threading
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from svdq_kernels import scratch
from triton.runtime import _allocation

from svdq_compile import _compat
from svdq_compile.backend import svdq
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def allocator(*_arguments):
    """What a kernel launched here would ask."""
    return _allocation._allocator.get()


def test_in_other_threads_and_contexts():
    found = []

    def backend(gm, inputs):
        with mock.patch.object(_compat, "compile_fx", return_value=allocator):
            compiled = svdq(gm, inputs)
        found.append(contextvars.Context().run(compiled, *inputs))
        thread = threading.Thread(target=lambda: found.append(compiled(*inputs)))
        thread.start()
        thread.join()
        return svdq(gm, inputs)

    with fake_gpu((9, 0)):
        compile_on_fake_gpu(random_linear(64, 128), (torch.randn(40, 128).bfloat16(),), backend=backend)
    assert found == [scratch.allocate, scratch.allocate]
    assert contextvars.Context().run(allocator) is not scratch.allocate


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_allocated():
    memory = scratch.allocate(300, 128, None)
    assert (memory.device.type, memory.nbytes) == ("cuda", 300)
    assert memory.data_ptr() % 128 == 0
