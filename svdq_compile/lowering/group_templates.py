"""GEMM templates of linears that share their activation: one launch walks over the tiles of every member.

Members follow each other in the result's last dimension. A program takes tiles of all members in turn, as if they were
one wide matrix, so that only the last member leaves multiprocessors idle. The text of a member's tile is there once and
unrolled by Triton, which picks the member's weight, scales, lora_up and bias.
"""

from __future__ import annotations

import functools

from .._compat import SymbolicGridFn, TritonTemplate
from .templates import arguments

SHARED = ("SCALE_A", "PARTIALS")
OWN = ("UP", "BIAS")
"""Inputs that may be absent: one for all members, and one per member."""

PERSISTENT = (
    "for tile in tl.range(start, tiles, tl.num_programs(0), num_stages=1):",
    "start += tl.cdiv(max(tiles - start, 0), tl.num_programs(0)) * tl.num_programs(0) - tiles",
)
ONE_TILE = ("tile = start\n        if (start >= 0) & (start < tiles):", "start -= tiles")
"""Text ahead of a tile and behind it. ``start`` is the program's next tile, counted from the member's first."""


@SymbolicGridFn
def persistent_grid(m, n, meta, *, cdiv, min):
    """One program per multiprocessor, fewer if there are fewer tiles."""
    return (min(meta["PROGRAMS"], cdiv(m, meta["BLOCK_M"]) * meta["TILES_N"]), 1, 1)


@SymbolicGridFn
def tile_grid(m, n, meta, *, cdiv):
    """One program per tile."""
    return (cdiv(m, meta["BLOCK_M"]) * meta["TILES_N"], 1, 1)


def names(shared: tuple[str, ...], own: tuple[str, ...], parts: tuple[str, ...], members: int) -> list[str]:
    """Inputs of a template: the shared ones, then those of each member with its number."""
    return [
        *shared,
        *(name for name in SHARED if name in parts),
        *(f"{name}{g}" for g in range(members) for name in (*own, *(name for name in OWN if name in parts))),
    ]


def _source(
    shared,
    own,
    parts,
    members,
    before,
    tiles,
    product,
    imports,
    columns="BLOCK_N",
    select=(),
    persistent=False,
) -> str:
    """Text of a template.

    Args:
        shared, own, parts, members: as :func:`names`.
        before: lines ahead of all members.
        tiles: how many tiles a member has.
        product: lines that compute acc, offs_m and offs_n of one tile; a last one that is indented leaves a loop open.
        imports: lines behind the kernel.
        columns: size of offs_n.
        select: more (name, value with the member's number left out) a member has.
        persistent: whether a program takes several tiles.
    """
    inputs = ", ".join(f'"{name}"' for name in names(shared, own, parts, members))
    lines = [f"{{{{def_kernel({inputs})}}}}", *(f"    {line}" for line in before)]
    lines += ["    first_n = 0", "    start = tl.program_id(0)", f"    for g in tl.static_range({members}):"]
    for g in range(members):
        lines.append(f"        if g == {g}:")
        lines.append(f'            N = {{{{size("W{g}", 0)}}}}')
        taken = [(name, name) for name in (*own, *(name for name in OWN if name in parts))]
        lines += [f"            {name} = {value}{g}" for name, value in (*taken, *select)]
    loop = " " * (len(product[-1]) - len(product[-1].lstrip()))
    where = f'("idx_m", "idx_n"), "acc", "mask", indent_width={12 + len(loop)}'
    store = f'{{{{store_output({where}, val_shape=("BLOCK_M", "{columns}"))}}}}'
    body = [
        *product,
        # 64 bits where the result has 2**31 elements or more.
        f"{loop}idx_m = offs_m.to(INDEX_DTYPE)[:, None]",
        f"{loop}idx_n = (first_n + offs_n).to(INDEX_DTYPE)[None, :]",
        f"{loop}mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]",
        f"{loop}{store}",
    ]
    walk, behind = PERSISTENT if persistent else ONE_TILE
    lines += [
        f"        tiles = {tiles}",
        f"        {walk}",
        *(f"            {line}" for line in body),
        f"        {behind}",
        "        first_n += N",
        "",
        *imports,
        "",
    ]
    return "\n".join(lines)


@functools.cache
def dense(parts: tuple[str, ...], members: int, tma: bool) -> TritonTemplate:
    """As :func:`svdq_compile.lowering.templates.dense` for several weights.

    Inputs X [M, K], the parts of :data:`SHARED` that are present, then per member W [N, K], SCALE_B and those of
    :data:`OWN`.

    Args:
        parts: the optional inputs present.
        members: how many linears.
        tma: whether tiles are loaded by tensor descriptors.
    """
    before = [
        'M = {{size("X", 0)}}',
        'K = {{size("X", 1)}}',
        'stride_xm = {{stride("X", 0)}}',
        'stride_wn = {{stride("W0", 0)}}',
        "x = X",
    ]
    select = [("w", "W")]
    if tma:
        before[-1:] = [
            "rows = descriptor_rows(M, BLOCK_M, WHOLE_TILES)",
            "x = tl.make_tensor_descriptor(X, [rows, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])",
        ]
        before += [
            f'w{g} = tl.make_tensor_descriptor(W{g}, [{{{{size("W{g}", 0)}}}}, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])'
            for g in range(members)
        ]
        select = [("w", "w")]
    product = [
        "origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)",
        "y = dense_tile(",
        f"    x, w, {arguments(parts)}, origin_m, origin_n, M, N, K, stride_xm, stride_wn,",
        "    PER_TOKEN, FACTOR_A, FACTOR_B, RANK, SPLITS, CHUNK, BLOCK_M, BLOCK_N, BLOCK_K, TMA",
        ")",
        "offs_m = origin_m + tl.arange(0, BLOCK_M)",
        "columns = column_parts(y, BLOCK_M, BLOCK_N, PARTS)",
        "for i in tl.static_range(PARTS):",
        "    acc = columns[i]",
        "    offs_n = origin_n + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)",
    ]
    source = _source(
        ("X",),
        ("W", "SCALE_B"),
        parts,
        members,
        before,
        "tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)",
        product,
        ["from svdq_kernels.dense import column_parts, dense_tile, descriptor_rows, tile_origin"],
        columns="BLOCK_N // PARTS",
        select=select,
        persistent=True,
    )
    name = _name("svdq_group_dense", parts, members) + ("_tma" if tma else "")
    return TritonTemplate(name=name, grid=persistent_grid, source=source)


@functools.cache
def blockscaled(parts: tuple[str, ...], members: int) -> TritonTemplate:
    """As :func:`svdq_compile.lowering.templates.blockscaled` for several weights.

    Inputs X, XS, SCALE_A, PARTIALS if there is a low-rank branch, then per member W, WS, SCALE_B and those of
    :data:`OWN`.

    Args:
        parts: the optional inputs present; SCALE_A is.
        members: how many linears.
    """
    partials, up = ("PARTIALS", "UP") if "UP" in parts else ("None", "None")
    bias = "BIAS" if "BIAS" in parts else "None"
    product = [
        "origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)",
        "acc = blockscaled_product(",
        "    X, XS, W, WS, origin_m, origin_n, M, N, K, K // 2, K // 16, K // 2, K // 16, 16, BLOCK_M, BLOCK_N,",
        "    BLOCK_K, EVEN_K, True",
        ")",
        "left, right = finish_product(",
        f"    acc, SCALE_A, SCALE_B, {partials}, {up}, {bias}, origin_m, origin_n, M, N, RANK, SPLITS, PER_TOKEN,",
        "    CHUNK",
        ")",
        "acc = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))",
        "offs_m = origin_m + tl.arange(0, BLOCK_M)",
        "offs_n = origin_n + tl.arange(0, BLOCK_N)",
    ]
    source = _source(
        ("X", "XS"),
        ("W", "WS", "SCALE_B"),
        parts,
        members,
        ['M = {{size("X", 0)}}', 'K = 2 * {{size("X", 1)}}'],
        "tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)",
        product,
        [
            "from svdq_kernels.blockscaled import blockscaled_product, finish_product",
            "from svdq_kernels.dense import tile_origin",
        ],
    )
    return TritonTemplate(name=_name("svdq_group_blockscaled", parts, members), grid=tile_grid, source=source)


@functools.cache
def gemv(parts: tuple[str, ...], members: int) -> TritonTemplate:
    """As :func:`svdq_compile.lowering.templates.gemv` for several weights.

    Inputs X, those of :data:`SHARED`, then per member W, WS, SCALE_B and those of :data:`OWN`.

    Args:
        parts: the optional inputs present.
        members: how many linears.
    """
    scale_a = "SCALE_A" if "SCALE_A" in parts else "None"
    product = [
        "origin_m, origin_n = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, 1)",
        "words = W.to(tl.pointer_type(tl.int32), bitcast=True)",
        "acc = few_tokens_product(",
        "    X, words, WS, origin_m, origin_n, M, N, IN_FEATURES, BLOCK_M, BLOCK_N, UNROLL, WARPS, EVEN_K",
        ")",
        "offs_m = origin_m + tl.arange(0, BLOCK_M)",
        "offs_n = origin_n + tl.arange(0, BLOCK_N)",
        f"acc = scaled(acc, {scale_a}, SCALE_B, offs_m, M, PER_TOKEN, 1.0, FACTOR)",
    ]
    if "UP" in parts:
        product.append("acc = add_low_rank_of_few(acc, PARTIALS, UP, offs_m, offs_n, M, N, RANK)")
    if "BIAS" in parts:
        product.append("acc = add_bias(acc, BIAS, offs_n, N)")
    source = _source(
        ("X",),
        ("W", "WS", "SCALE_B"),
        parts,
        members,
        ['M = {{size("X", 0)}}'],
        "tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)",
        product,
        [
            "from svdq_kernels.dense import add_bias, scaled, tile_origin",
            "from svdq_kernels.gemv import add_low_rank_of_few, few_tokens_product",
        ],
    )
    return TritonTemplate(name=_name("svdq_group_gemv", parts, members), grid=tile_grid, source=source)


def _name(stem: str, parts: tuple[str, ...], members: int) -> str:
    return "_".join((f"{stem}{members}", *(part.lower() for part in parts)))
