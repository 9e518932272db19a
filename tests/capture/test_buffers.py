"""Static inputs have the strides and the alignment of what they stand for, and hold exactly its values."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from svdq_compile.cuda_graphs.buffers import StaticInput
from svdq_compile.cuda_graphs.refusal import Refused


@st.composite
def views(draw):
    """Two tensors of one layout: permuted, sliced, expanded, offset."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.bool]))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 2])) for _ in shape]
    offset = draw(st.integers(0, 9))
    expand = draw(st.sampled_from([None, *range(len(shape))]))
    strides, reach = [0] * len(shape), 1
    for dim in order:
        strides[dim] = 0 if dim == expand else reach * steps[dim]
        reach = max(1, reach * steps[dim] * max(1, shape[dim]))
    pair = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        storage = torch.randint(0, 2, (reach + offset + 1,), generator=generator).to(dtype)
        pair.append(storage.as_strided(shape, strides, offset))
    return pair


@hypothesis.given(views())
def test_layout_and_values(pair):
    first, second = pair
    buffer = StaticInput(first)
    tensor = buffer.tensor
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (first.shape, first.stride(), first.dtype)
    if first.numel():
        assert tensor.data_ptr() % 16 == first.data_ptr() % 16
        assert tensor.data_ptr() != first.data_ptr()
    assert torch.equal(tensor, first)
    buffer.load(second)
    assert buffer.tensor is tensor
    assert torch.equal(tensor, second)
    assert buffer.nbytes >= tensor.element_size() * (1 if tensor.numel() else 0)


def test_an_expanded_tensor_is_stored_once():
    assert StaticInput(torch.zeros(1).expand(1000)).nbytes == 4


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_a_tensor_that_overlaps_itself_is_refused(strides):
    with pytest.raises(Refused, match="overlaps itself"):
        StaticInput(torch.zeros(20).as_strided((4, 3), strides))
