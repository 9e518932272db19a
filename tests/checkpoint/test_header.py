"""Reading safetensors headers."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from svdq_compile.checkpoint.header import ITEM_BITS, MAX_HEADER_BYTES, read_header
from svdq_compile.dtypes import DTYPE_NAMES
from svdq_compile.errors import CheckpointError, HeaderError, TruncatedFileError


def write(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "b": torch.tensor(1.5),
        "c": torch.ones(4, dtype=torch.float8_e4m3fn),
        "d": torch.ones(2, 2, dtype=torch.bfloat16),
        "e": torch.ones(0, 3, dtype=torch.float16),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "note": "\u00e9"})
    header = read_header(file)
    assert header.metadata == {"format": "pt", "note": "\u00e9"}
    assert header.tensors.keys() == tensors.keys()
    data = file.read_bytes()[8 + int.from_bytes(file.read_bytes()[:8], "little") :]
    for key, tensor in tensors.items():
        info = header.tensors[key]
        assert (info.file, info.dtype, info.shape) == (file, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert data[info.start : info.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_an_empty_file_of_tensors_is_read(tmp_path):
    assert read_header(write(tmp_path / "x", {})).tensors == {}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        (b"[]", b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b"9" * 5000, b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        ({"a": 3}, b"", "exactly dtype, shape and data_offsets"),
        ({"a": entry() | {"x": 1}}, b"1234", "exactly dtype, shape and data_offsets"),
        ({"a": entry("F4")}, b"1234", "unknown dtype"),
        ({"a": entry(["U8"])}, b"1234", "unknown dtype"),
        ({"a": entry(shape=(True, 4))}, b"1234", "list of sizes"),
        ({"a": entry(shape=(-4,))}, b"1234", "list of sizes"),
        ({"a": entry(shape=(2**63,))}, b"1234", "list of sizes"),
        ({"a": entry(shape=(1,) * 65, offsets=(0, 1))}, b"1", "list of sizes"),
        ({"a": entry(offsets=(4, 0))}, b"1234", "[start, end]"),
        ({"a": entry(offsets=(0, 4, 8))}, b"1234", "[start, end]"),
        ({"a": entry(offsets=(0, True))}, b"1", "[start, end]"),
        ({"a": entry(shape=(5,))}, b"1234", "do not fit"),
        ({"a": entry("U16")}, b"1234", "do not fit"),
        ({"a": entry(shape=(2**62,) * 60)}, b"1234", "do not fit"),
        ({"a": entry(offsets=(1, 5))}, b"12345", "belong to none"),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", "overlap"),
        ({"a": entry(), "b": entry()}, b"1234", "overlap"),
        ({"a": entry()}, b"12345", "bytes after the last tensor"),
        ({"__metadata__": {"a": 1}}, b"", "strings"),
        ({"__metadata__": None}, b"", "strings"),
        (b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": 1}', b"", "twice"),
        (b'{"a": {"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
    ],
)
def test_contradictions_are_header_errors(tmp_path, header, data, what):
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(HeaderError) as caught:
        read_header(file)
    assert what in caught.value.what
    assert str(file) in str(caught.value)


def test_an_implausible_length_is_not_allocated(tmp_path):
    with pytest.raises(HeaderError) as caught:
        read_header(write(tmp_path / "x", {}, length=MAX_HEADER_BYTES + 1))
    assert caught.value.found == MAX_HEADER_BYTES + 1


@pytest.mark.parametrize("cut", [0, 7, 8, 20, -1])
def test_a_file_cut_anywhere_is_truncated(tmp_path, cut):
    whole = write(tmp_path / "x", {"a": entry()}, b"1234").read_bytes()
    (tmp_path / "x").write_bytes(whole[:cut])
    with pytest.raises(TruncatedFileError):
        read_header(tmp_path / "x")


def test_the_errors_name_the_tensor(tmp_path):
    with pytest.raises(HeaderError) as caught:
        read_header(write(tmp_path / "x", {"good": entry(), "bad": entry(shape=(3,), offsets=(4, 8))}, b"12345678"))
    error = caught.value
    assert (error.file, error.key) == (str(tmp_path / "x"), "bad")
    assert (error.found, error.needed) == ("4 bytes", "3 bytes for U8 [3]")


def read_or_refused(file):
    """Data bytes of the file's tensors, or None if it was refused with a message that names the file."""
    message = None
    try:
        return sum(info.nbytes for info in read_header(file).tensors.values())
    except CheckpointError as error:
        message = str(error)
    assert str(file) in message
    return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(ITEM_BITS)) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_values,
    }
)


@given(
    header=json_values | st.dictionaries(st.text(max_size=3), entries, max_size=3),
    data=st.binary(max_size=16),
)
def test_any_json_is_read_or_refused(tmp_path_factory, header, data):
    file = write(tmp_path_factory.getbasetemp() / "any.safetensors", header, data)
    assert read_or_refused(file) in (None, len(data))


@given(blob=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(tmp_path_factory, blob):
    file = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    file.write_bytes(blob)
    assert read_or_refused(file) in (None, 0)
