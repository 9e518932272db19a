"""Edits of safetensors headers and of the files' bytes."""

from __future__ import annotations

import json
import random

from ..errors import CheckpointError, HeaderError, SwizzledScalesError, TruncatedFileError
from .memory_checkpoints import Contents, Files, join_file, split_file, weight_files
from .mutations import Outcome, Stage, edit, either, fails

HUGE = (2**31, 2**63, 2**64, 10**4000)


def _entry(files: Files, rng: random.Random) -> tuple[str, dict, bytes, dict]:
    """A random file, its header and data, and a random tensor's entry in that header."""
    name = rng.choice(weight_files(files))
    header, data = split_file(files[name])
    key = rng.choice([key for key in header if key != "__metadata__"])
    return name, header, data, header[key]


@edit(Stage.HEADER)
def entry_field_missing(files: Files, rng: random.Random) -> Outcome:
    name, header, data, entry = _entry(files, rng)
    for field in rng.sample(sorted(entry), rng.randrange(1, len(entry) + 1)):
        del entry[field]
    files[name] = join_file(header, data)
    return fails(HeaderError)


@edit(Stage.HEADER)
def entry_field_of_other_type(files: Files, rng: random.Random) -> Outcome:
    name, header, data, entry = _entry(files, rng)
    values = [None, True, 1.5, "text", {}, [None], [True], [[0]], [0.5], ["1"], [-1, 1], [False, True, 0]]
    values += [[n] for n in HUGE] + [[0, n] for n in HUGE] + [[2] * 70, [2**40] * 10]
    entry[rng.choice(sorted(entry))] = rng.choice(values)
    files[name] = join_file(header, data)
    return fails(HeaderError)


@edit(Stage.HEADER)
def entry_not_an_object(files: Files, rng: random.Random) -> Outcome:
    name, header, data, entry = _entry(files, rng)
    key = next(key for key, value in header.items() if value is entry)
    header[key] = rng.choice([None, [], "x", 3, [entry], {**entry, "extra": 1}])
    files[name] = join_file(header, data)
    return fails(HeaderError)


@edit(Stage.HEADER)
def dtype_unknown(files: Files, rng: random.Random) -> Outcome:
    name, header, data, entry = _entry(files, rng)
    entry["dtype"] = rng.choice(["F4", "bf16", "", "F8_E4M3FN", "BF16 ", "torch.bfloat16", 16])
    files[name] = join_file(header, data)
    return fails(HeaderError)


@edit(Stage.HEADER)
def offsets_shifted(files: Files, rng: random.Random) -> Outcome:
    """One tensor moved: it overlaps a neighbour, leaves a hole, or lies beyond the end."""
    name, header, data, entry = _entry(files, rng)
    start, end = entry["data_offsets"]
    shift = rng.choice([-start, 1, -1, 8, end - start, len(data), 2**40])
    entry["data_offsets"] = [start + shift, end + shift]
    files[name] = join_file(header, data)
    # Only the first tensor can have shift 0; take the next byte then.
    if not shift:
        entry["data_offsets"] = [start + 1, end + 1]
        files[name] = join_file(header, data)
    return fails(HeaderError, TruncatedFileError)


@edit(Stage.HEADER)
def offsets_reversed(files: Files, rng: random.Random) -> Outcome:
    name, header, data, entry = _entry(files, rng)
    entry["data_offsets"].reverse()
    files[name] = join_file(header, data)
    return fails(HeaderError)


@edit(Stage.HEADER)
def hole_in_data(files: Files, rng: random.Random) -> Outcome:
    """Bytes no tensor owns, before every tensor that follows them."""
    name, header, data, entry = _entry(files, rng)
    at, size = entry["data_offsets"][0], rng.randrange(1, 64)
    for key, other in header.items():
        if key != "__metadata__" and other["data_offsets"][0] >= at:
            other["data_offsets"] = [offset + size for offset in other["data_offsets"]]
    files[name] = join_file(header, data[:at] + rng.randbytes(size) + data[at:])
    return fails(HeaderError)


@edit(Stage.HEADER)
def metadata_malformed(files: Files, rng: random.Random) -> Outcome:
    name, header, data, _ = _entry(files, rng)
    header["__metadata__"] = rng.choice([None, [], "pt", {"format": 1}, {"format": None}, {"a": {"b": "c"}}])
    files[name] = join_file(header, data)
    return fails(HeaderError)


@edit(Stage.CONTENTS)
def scales_marked_swizzled(contents: Contents, rng: random.Random) -> Outcome:
    rng.choice(list(contents.shards.values())).metadata["quantization_config"] = json.dumps({"layout": "tiled"})
    return fails(SwizzledScalesError)


@edit(Stage.BYTES)
def file_truncated(files: Files, rng: random.Random) -> Outcome:
    name = rng.choice(weight_files(files))
    header_end = 8 + int.from_bytes(files[name][:8], "little")
    cut = rng.choice([rng.randrange(len(files[name])), rng.randrange(8), rng.randrange(header_end)])
    files[name] = files[name][:cut]
    return fails(TruncatedFileError)


@edit(Stage.BYTES)
def bytes_appended(files: Files, rng: random.Random) -> Outcome:
    name = rng.choice(weight_files(files))
    files[name] += rng.randbytes(rng.randrange(1, 100))
    return fails(HeaderError)


@edit(Stage.BYTES)
def header_length_random(files: Files, rng: random.Random) -> Outcome:
    name = rng.choice(weight_files(files))
    true = int.from_bytes(files[name][:8], "little")
    options = [
        rng.randrange(2**64),
        rng.randrange(2**32),
        rng.randrange(2 * true),
        true + 1,
        true - 1,
        0,
        2**64 - 1,
    ]
    length = rng.choice([option for option in options if option != true])
    files[name] = length.to_bytes(8, "little") + files[name][8:]
    return fails(HeaderError, TruncatedFileError)


@edit(Stage.BYTES)
def header_byte_changed(files: Files, rng: random.Random) -> Outcome:
    """May hit a space or a metadata string, which nothing depends on."""
    name = rng.choice(weight_files(files))
    blob = bytearray(files[name])
    at = rng.randrange(8, 8 + int.from_bytes(blob[:8], "little"))
    blob[at] = rng.choice([blob[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
    files[name] = bytes(blob)
    return either(CheckpointError)


@edit(Stage.BYTES)
def header_not_an_object(files: Files, rng: random.Random) -> Outcome:
    name = rng.choice(weight_files(files))
    text = rng.choice([b"", b"[]", b"null", b"3", b'"x"', b"[" * 50_000, b"\xff\xfe{}", b"{}{}", b"1" * 5000, b"NaN"])
    files[name] = len(text).to_bytes(8, "little") + text
    return fails(HeaderError)


@edit(Stage.BYTES)
def key_twice(files: Files, rng: random.Random) -> Outcome:
    """One key twice in the header, with the same entry or as a second empty tensor."""
    name = rng.choice(weight_files(files))
    length = int.from_bytes(files[name][:8], "little")
    text, data = files[name][8 : 8 + length].rstrip(), files[name][8 + length :]
    header = json.loads(text)
    key = rng.choice(list(header))
    again = rng.choice([header[key], {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}])
    text = text[:-1] + f",{json.dumps(key)}:{json.dumps(again)}}}".encode()
    files[name] = len(text).to_bytes(8, "little") + text + data
    return fails(HeaderError)
