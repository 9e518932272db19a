"""Edits of tensors: dtypes, shapes, values, keys."""

from __future__ import annotations

import random
import struct

from ..checkpoint.header import ITEM_BITS
from ..errors import (
    DtypeError,
    GroupSizeError,
    LeftoverKeyError,
    LoraPairError,
    MissingKeyError,
    NonFiniteError,
    ScaleError,
    ShapeError,
    UnknownLinearError,
    ZeroScaleError,
)
from ..errors import HeaderError as Damaged
from .memory_checkpoints import Contents, StoredTensor
from .mutations import Outcome, Stage, edit, fails

SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
INF, NAN = float("inf"), float("nan")


def encode(value: float, dtype: str) -> bytes:
    """One element in a model dtype, little-endian; cutting off to BF16 is exact for the values used here."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F16": "<e", "F32": "<f"}[dtype], value)


def poke(tensor: StoredTensor, element: bytes, rng: random.Random) -> None:
    """Overwrites one random element."""
    start = rng.randrange(len(tensor.data) // len(element)) * len(element)
    tensor.data = tensor.data[:start] + element + tensor.data[start + len(element) :]


@edit(Stage.CONTENTS)
def dtype_of_same_size(contents: Contents, rng: random.Random) -> Outcome:
    key = contents.pick(rng)
    role, tensor = contents.roles()[key], contents.tensors[key]
    old = tensor.dtype
    tensor.dtype = rng.choice([d for d, bits in ITEM_BITS.items() if bits == ITEM_BITS[old] and d != old])
    if role == "qweight" and {old, tensor.dtype} == {"U8", "F8_E4M3"}:
        # Now it reads as a weight of the other format, which has other components.
        return fails(DtypeError, LeftoverKeyError, MissingKeyError)
    return fails(DtypeError)


@edit(Stage.CONTENTS)
def dtype_of_other_size(contents: Contents, rng: random.Random) -> Outcome:
    tensor = contents.tensors[contents.pick(rng)]
    old = ITEM_BITS[tensor.dtype]
    tensor.dtype = rng.choice([d for d, bits in ITEM_BITS.items() if bits != old])
    return fails(Damaged)


@edit(Stage.CONTENTS)
def shape_of_same_count(contents: Contents, rng: random.Random) -> Outcome:
    tensor = contents.tensors[contents.pick(rng)]
    shape = tensor.shape
    count = 1
    for size in shape:
        count *= size
    options = [[1, *shape], [*shape, 1], [count], shape[::-1], [count, 1], [1, count]]
    if shape and shape[-1] % 2 == 0:
        options += [[*shape[:-1], shape[-1] // 2, 2], [2 * shape[0], *shape[1:-1], shape[-1] // 2]]
    tensor.shape = rng.choice([option for option in options if option != shape and len(option) < 5])
    return fails(ShapeError)


@edit(Stage.CONTENTS)
def shape_of_other_count(contents: Contents, rng: random.Random) -> Outcome:
    tensor = contents.tensors[contents.pick(rng)]
    options = [[*tensor.shape, 2], [2, *tensor.shape], [0], [s + 1 for s in tensor.shape] or [3]]
    tensor.shape = rng.choice(options)
    return fails(Damaged)


@edit(Stage.CONTENTS)
def tensor_of_other_size(contents: Contents, rng: random.Random) -> Outcome:
    """A consistent tensor of another size: one row more or fewer, or none left."""
    key = contents.pick(rng, "qweight", "weight_scale", "bias", "dense", "pre_quant_scale")
    tensor = contents.tensors[key]
    row = len(tensor.data) // tensor.shape[0]
    rows = rng.choice([0, tensor.shape[0] - 1, tensor.shape[0] + 1])
    tensor.data = (tensor.data + tensor.data)[: rows * row]
    tensor.shape = [rows, *tensor.shape[1:]]
    return fails(ShapeError)


@edit(Stage.CONTENTS)
def columns_off_the_group(contents: Contents, rng: random.Random) -> Outcome | None:
    """A packed weight whose inputs do not divide by 16."""
    key = contents.pick(rng, "qweight")
    tensor = contents.tensors[key]
    if tensor.dtype != "U8":
        return None
    tensor.shape = [tensor.shape[0], tensor.shape[1] - 3]
    tensor.data = tensor.data[: tensor.shape[0] * tensor.shape[1]]
    return fails(GroupSizeError)


@edit(Stage.CONTENTS)
def scale_not_finite(contents: Contents, rng: random.Random) -> Outcome:
    tensor = contents.tensors[contents.pick(rng, *SCALES)]
    if tensor.dtype == "F8_E4M3":
        poke(tensor, rng.choice([b"\x7f", b"\xff"]), rng)
    else:
        poke(tensor, encode(rng.choice([NAN, INF, -INF]), tensor.dtype), rng)
    return fails(ScaleError)


@edit(Stage.CONTENTS)
def scale_negative(contents: Contents, rng: random.Random) -> Outcome:
    tensor = contents.tensors[contents.pick(rng, *SCALES)]
    if tensor.dtype == "F8_E4M3":
        poke(tensor, bytes([0x80 | rng.randrange(1, 0x7F)]), rng)
    else:
        poke(tensor, encode(rng.choice([-1.0, -(2.0**-14)]), tensor.dtype), rng)
    return fails(ScaleError)


@edit(Stage.CONTENTS)
def scale_zero(contents: Contents, rng: random.Random) -> Outcome:
    keys = [key for key, role in contents.roles().items() if role in SCALES]
    tensor = contents.tensors[rng.choice([k for k in keys if contents.tensors[k].dtype != "F8_E4M3"])]
    poke(tensor, encode(rng.choice([0.0, -0.0]), tensor.dtype), rng)
    return fails(ZeroScaleError)


@edit(Stage.CONTENTS)
def value_not_finite(contents: Contents, rng: random.Random) -> Outcome:
    roles = ("bias", "lora_down", "lora_up", "dense", "qweight")
    tensor = contents.tensors[contents.pick(rng, *roles)]
    if tensor.dtype == "U8":
        tensor = contents.tensors[contents.pick(rng, "bias", "dense")]
    if tensor.dtype == "F8_E4M3":
        poke(tensor, rng.choice([b"\x7f", b"\xff"]), rng)
    else:
        poke(tensor, encode(rng.choice([NAN, INF, -INF]), tensor.dtype), rng)
    return fails(NonFiniteError)


@edit(Stage.CONTENTS, group="keys")
def key_missing(contents: Contents, rng: random.Random) -> Outcome:
    key = contents.pick(rng, "qweight", "weight_scale", "weight_scale_2", "input_scale", "bias", "dense")
    contents.remove(key)
    return fails(MissingKeyError)


@edit(Stage.CONTENTS, group="keys")
def module_missing(contents: Contents, rng: random.Random) -> Outcome:
    """All tensors of one layer gone."""
    module = contents.pick(rng, "qweight", "dense").rpartition(".")[0]
    for key in [key for key in contents.tensors if key.rpartition(".")[0] == module]:
        contents.remove(key)
    return fails(MissingKeyError)


@edit(Stage.CONTENTS, group="keys")
def low_rank_part_missing(contents: Contents, rng: random.Random) -> Outcome | None:
    key = contents.pick(rng, "lora_down")
    if key is None:
        return None
    module = key.rpartition(".")[0]
    a, b, scale = "svdquant_lora_a", "svdquant_lora_b", "pre_quant_scale"
    for leaf in rng.choice([(a,), (b,), (a, b), (scale,), (a, scale), (b, scale)]):
        contents.remove(f"{module}.{leaf}")
    return fails(LoraPairError)


@edit(Stage.CONTENTS, group="keys")
def key_left_over(contents: Contents, rng: random.Random) -> Outcome:
    weight = contents.pick(rng, "qweight")
    module, fp8 = weight.removesuffix(".weight"), contents.tensors[weight].dtype == "F8_E4M3"
    bias = contents.tensors[f"{module}.bias"]
    scalar = StoredTensor("F32", [], encode(1.0, "F32"))
    options = [(f"{module}.zero_point", bias), ("extra", bias), ("proj_out.extra.bias", bias)]
    options += [("transformer_blocks.0.attn.to_q.lora_A.default.weight", bias)]
    if fp8:
        options += [(f"{module}.weight_scale_2", scalar), (f"{module}.pre_quant_scale", bias)]
    key, tensor = rng.choice(options)
    contents.add(key, tensor)
    return fails(LeftoverKeyError)


@edit(Stage.CONTENTS, group="keys")
def low_rank_part_added(contents: Contents, rng: random.Random) -> Outcome | None:
    """One or two of the three low-rank tensors on a plain NVFP4 linear."""
    svd = {key.rpartition(".")[0] for key, role in contents.roles().items() if role == "lora_down"}
    plain = [k for k, r in contents.roles().items() if r == "qweight" and k.rpartition(".")[0] not in svd]
    if not plain or contents.tensors[plain[0]].dtype != "U8":
        return None
    module = rng.choice(plain).rpartition(".")[0]
    leaf = rng.choice(["svdquant_lora_a", "svdquant_lora_b", "pre_quant_scale"])
    contents.add(f"{module}.{leaf}", contents.tensors[f"{module}.bias"])
    return fails(LoraPairError)


@edit(Stage.CONTENTS, group="keys")
def scale_beside_dense_weight(contents: Contents, rng: random.Random) -> Outcome:
    dense = [k for k, role in contents.roles().items() if role == "dense" and k.endswith(".weight")]
    leaf = rng.choice(["weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "svdquant_lora_a"])
    scalar = StoredTensor("F32", [], encode(1.0, "F32"))
    bias = contents.tensors[contents.pick(rng, "bias")]
    module = rng.choice(dense).rpartition(".")[0]
    contents.add(f"{module}.{leaf}", bias if leaf in ("pre_quant_scale", "svdquant_lora_a") else scalar)
    return fails(DtypeError)


@edit(Stage.CONTENTS, group="keys")
def quantised_module_renamed(contents: Contents, rng: random.Random) -> Outcome:
    """A layer's tensors under a name the model does not have, or has for something that is no linear."""
    module = contents.pick(rng, "qweight").rpartition(".")[0]
    new = rng.choice(
        [module + "_x", module.replace("transformer_blocks.1", "blocks.1"), "pos_embed", "x", "img.\u2603"]
    )
    for key in [key for key in contents.tensors if key.rpartition(".")[0] == module]:
        contents.rename(key, f"{new}.{key.rpartition('.')[2]}")
    return fails(UnknownLinearError)


@edit(Stage.CONTENTS, group="keys")
def dense_module_renamed(contents: Contents, rng: random.Random) -> Outcome:
    module = contents.pick(rng, "dense").rpartition(".")[0]
    for key in [key for key in contents.tensors if key.rpartition(".")[0] == module]:
        contents.rename(key, f"{module}_x.{key.rpartition('.')[2]}")
    return fails(LeftoverKeyError)


@edit(Stage.CONTENTS, group="keys")
def leaf_renamed(contents: Contents, rng: random.Random) -> Outcome:
    """A misspelt key: its linear lacks it, and nothing takes it."""
    key = contents.pick(rng)
    contents.rename(key, key + "s")
    return fails(LeftoverKeyError, MissingKeyError, DtypeError)


@edit(Stage.CONTENTS, group="keys")
def prefix_added(contents: Contents, rng: random.Random) -> Outcome:
    """Every key as another tool writes it."""
    prefix = rng.choice(["model.diffusion_model.", "transformer."])
    for key in list(contents.tensors):
        contents.rename(key, prefix + key)
    return fails(UnknownLinearError)
