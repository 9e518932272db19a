"""Captured models on the CPU, by graphs that re-execute."""

import pytest

from svdq_compile.cuda_graphs.captured import install
from svdq_compile.testing.fake_graphs import FakeGraphs
from svdq_compile.testing.random_model import random_transformer


@pytest.fixture
def model():
    return random_transformer()


@pytest.fixture
def captured():
    """``captured(model, max_shapes=8, strict=True, **of_FakeGraphs) -> (handle, graphs)``; released at the end."""
    handles = []

    def make(model, max_shapes=8, strict=True, **options):
        graphs = FakeGraphs(model, **options)
        handles.append(install(model, max_shapes, strict, graphs))
        return handles[-1], graphs

    yield make
    for handle in handles:
        handle.release()
