# mypy: disable-error-code="no-untyped-def"
# (what a jitted function takes and returns has types only to Triton)
"""The Triton kernel for many rows of x: a matmul whose weight is dequantized in registers.

    y[m, n] = sum_k x[m, k] * W[n, k] + bias[n],    W = (q - zero_point) * scale, rounded once to x's dtype

W is what `int3_dequantize` gives, bit for bit, and sums are fp32: the result is that of dequantizing and a matmul,
without a weight in memory. A program computes y^T = W x^T for BLOCK_N rows of W and BLOCK_M rows of x:

    packed words   by cp.async to shared memory, some stages ahead; from there to registers, 16 bytes a lane and plane
    W              unpacked and dequantized where it lies, which is operand A (fragments.py): it is never stored
    x              by cp.async to shared memory; operand B

A warp has 32 rows of W, one row tile. To a tensor instruction of 64 rows its two blocks of 16 are two instructions, so
rows of the accumulator are ordered (block, row tile, 16) and put in order when y is stored.

Operand B. Fragments have the columns of x in the order of int3_layout.py, (slab, hi, t, odd) in 32. mma.sync (sm_80,
89, 120) takes B from registers and a lane's columns are 16 contiguous bytes, so x is read as it lies. wgmma (sm_90)
takes B from shared memory, so x makes one more pass through registers, permuted by the stmatrix that stores it. tcgen05
(sm_100) could take W from tensor memory; Triton 3.9 stores it to shared memory.

Dequantizing two weights. fp16: or-ing in 1024 gives 1024 + q * 2^p; bf16 has 128 + q * 2^p already. One FMA,
2^-p * that - (1024 * 2^-p + zero_point), is q - zero_point exactly, one multiplication by the scale rounds once. A
scale of another dtype than x's is multiplied in fp32. With the unpacking 1.9 instructions a weight in bf16, 1.8 to 2.3
in fp16.

SLICES > 1: a program has one row tile, and its warps take one column tile each; Triton then uses mma.sync.
Splits: K in parts for programs of their own, which store fp32; `sum_splits` adds them in order, so that
results repeat. A fixed M is nowhere compiled in; what is chosen by M is gemm_config.py.

Rejected: loading x to registers a step ahead and permuting from there, one pass through shared memory less, but 255
registers and spills at 128 rows of x. One dot product of all 128 columns: 64 more registers for W.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq_ao.kernels.fragments import unpack
from mbq_ao.kernels.gemm_config import GemmConfig, default_gemm_config, split_of
from mbq_ao.kernels.launch import capability_of, empty_output, interpreted, linear_arguments, on_device
from mbq_ao.kernels.sums import sum_slices, sum_splits


@triton.jit
def _minus_zero(v, zero, PLACE: tl.constexpr, BF16: tl.constexpr, INTERPRETED: tl.constexpr):
    """q - zero, exact, of a field of class 2^PLACE: one FMA of (magic + q * 2^PLACE) for two weights."""
    ONE: tl.constexpr = 128.0 if BF16 else 1024.0
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    offset = -(ONE * 2.0**-PLACE) - zero
    if INTERPRETED:
        if not BF16:
            v = (v.to(tl.uint16, bitcast=True) | 0x6400).to(tl.float16, bitcast=True)
        return v.to(tl.float32) * 2.0**-PLACE + offset
    inverse = tl.full([1, 1, 1, 1], 2.0**-PLACE, DTYPE)
    FP16_ASM: tl.constexpr = "{ .reg .b32 r; or.b32 r, $1, 0x64006400; fma.rn.f16x2 $0, r, $2, $3; }"
    asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;" if BF16 else FP16_ASM
    args = [v, inverse, offset.to(DTYPE)]
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", args, dtype=v.dtype, is_pure=True, pack=2)


@triton.jit
def _times_scale(d, scale, BF16: tl.constexpr, INTERPRETED: tl.constexpr):
    """d * scale rounded once, as `dequantize` rounds: in 16 bits where scale has x's dtype, else through fp32."""
    DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if INTERPRETED:
        w = d * scale.to(tl.float32)
        if not BF16:
            return w.to(tl.float16)
        bits = w.to(tl.int32, bitcast=True)  # the interpreter's own conversion truncates
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    if scale.dtype != DTYPE:
        return (d.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
    # bf16 has no multiplication before sm_90; adding -0 changes nothing.
    BF16_ASM: tl.constexpr = "{ .reg .b32 r; mov.b32 r, 0x80008000; fma.rn.bf16x2 $0, $1, $2, r; }"
    asm: tl.constexpr = BF16_ASM if BF16 else "mul.rn.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [d, scale], dtype=d.dtype, is_pure=True, pack=2)


@triton.jit
def _slab(f0, f1, scale, zero, PLACE: tl.constexpr, BF16: tl.constexpr, INTERPRETED: tl.constexpr):
    """16 columns of operand A, (slices, rows, 16), from both row blocks; scale, zero: (slices, tiles, 8, 2, block)."""
    SLICES: tl.constexpr = f0.shape[0]
    TILES: tl.constexpr = f0.shape[1]
    s0, s1 = tl.split(scale)
    z0, z1 = tl.split(zero)
    d0 = _minus_zero(f0, _over_fragment(z0), PLACE, BF16, INTERPRETED)
    d1 = _minus_zero(f1, _over_fragment(z1), PLACE, BF16, INTERPRETED)
    w0 = _times_scale(d0, _over_fragment(s0), BF16, INTERPRETED)
    w1 = _times_scale(d1, _over_fragment(s1), BF16, INTERPRETED)
    w = tl.join(w0, w1).reshape(SLICES, TILES, 8, 4, 2, 2, 2, 2)  # slice, tile, g, t, hi, up, odd, block
    return w.permute(0, 7, 1, 5, 2, 4, 3, 6).reshape(SLICES, TILES * 32, 16)


@triton.jit
def _over_fragment(v):
    """One number for each (slice, tile, g, up) as one for each (slice, tile, lane, half)."""
    SLICES: tl.constexpr = v.shape[0]
    TILES: tl.constexpr = v.shape[1]
    v = v[:, :, :, None, None, :, None].broadcast_to(SLICES, TILES, 8, 4, 2, 2, 2)
    return v.reshape(SLICES, TILES, 32, 8)


@triton.jit
def _side_by_side(u, v):
    """Columns of v after those of u."""
    return tl.join(u, v).permute(0, 1, 3, 2).reshape(u.shape[0], u.shape[1], u.shape[2] * 2)


@triton.jit
def _x_operand(x, offsets, k0, K, EVEN_K: tl.constexpr):
    """Operand B, (slices, columns, rows of x), in the order of columns that the fragments of A have."""
    SLICES: tl.constexpr = offsets.shape[0]
    BLOCK_M: tl.constexpr = offsets.shape[1]
    WIDTH: tl.constexpr = offsets.shape[2]
    if EVEN_K:
        v = tl.load(x + k0 + offsets)
    else:
        slices = tl.arange(0, SLICES)[:, None, None] * 128
        k = k0 + slices + tl.arange(0, WIDTH)[None, None, :]
        v = tl.load(x + k0 + offsets, mask=k < K, other=0.0)
    v = v.reshape(SLICES, BLOCK_M, WIDTH // 32, 4, 2, 2, 2)  # slice, m, pair, t, slab, hi, odd
    return v.permute(0, 2, 4, 5, 3, 6, 1).reshape(SLICES, WIDTH, BLOCK_M)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    else:
        # Nothing, but what has an effect is not moved: without it 197 registers for 163 with 64 rows of x, and with 128
        # rows, in groups of 32, spills.
        a = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [a], dtype=a.dtype, is_pure=False, pack=2)
    if a.shape[0] == 1:
        a, b = a.reshape(a.shape[1], a.shape[2]), b.reshape(b.shape[1], b.shape[2])
    return tl.dot(a, b, acc)


@triton.jit
def _load_groups(scale, zero, tile, K, GROUP: tl.constexpr):
    """Scale and zero of a column tile: (slices, tiles, g, up, 2 * groups), last index 2 * group + block."""
    group = tile * 0 if GROUP == 0 else tile * 128 // GROUP
    if GROUP == 32 or GROUP == 64:
        e = tl.arange(0, 2 * (128 // GROUP))
        group = tl.minimum(group + e // 2, tl.cdiv(K, GROUP) - 1)
    return tl.load(scale + group), tl.load(zero + group).to(tl.float32)


@triton.jit(do_not_specialize=["M", "split_tiles"])  # or every batch size that is 1, or a multiple of 16, compiles anew
def _gemm_kernel(
    x, qdata, scale, zero, bias, y, M, N, K, stride_xm, stride_q0, stride_q1, stride_scale, stride_zero, split_tiles,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    BF16: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y = x @ dequantized(qdata).T + bias for BLOCK_N columns and BLOCK_M rows of y.  GROUP = 0: one scale a row.

    Over split_tiles column tiles, from those of program_id(2) on; y then has one matrix for each.
    """
    TILES: tl.constexpr = BLOCK_N // 32
    # Nothing is masked but columns of x beyond K: rows beyond M or N repeat the last one, and are not stored.
    m0 = tl.program_id(1) * BLOCK_M
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m0).to(tl.int64)
    slices = tl.arange(0, SLICES)
    x += m0.to(tl.int64) * stride_xm
    offsets = slices[:, None, None] * 128 + m[None, :, None] * stride_xm + tl.arange(0, BLOCK_K)[None, None, :]

    num_col_tiles = tl.cdiv(K, 128)
    # In two dimensions, for what gemv_loads.py says of loads.
    both = tl.arange(0, SLICES * TILES)
    row_tile = tl.minimum(tl.program_id(0) * TILES + both % TILES, tl.cdiv(N, 32) - 1)
    words = qdata + (row_tile.to(tl.int64) * stride_q0)[:, None] + tl.arange(0, 256)[None, :]

    GROUPS: tl.constexpr = 128 // GROUP if GROUP == 32 or GROUP == 64 else 1
    n = (
        tl.program_id(0) * BLOCK_N
        + tl.arange(0, TILES)[None, :, None, None, None] * 32
        + tl.arange(0, 8)[None, None, :, None, None]
        + tl.arange(0, 2)[None, None, None, :, None] * 8
        + (tl.arange(0, 2 * GROUPS) % 2)[None, None, None, None, :] * 16
    )
    n = tl.minimum(n, N - 1).to(tl.int64)
    scale += n * stride_scale
    zero += n * stride_zero
    start = tl.program_id(2) * split_tiles
    end = tl.minimum(start + split_tiles, num_col_tiles)
    tile = tl.minimum(start + slices, num_col_tiles - 1)
    next_s, next_z = _load_groups(scale, zero, tile[:, None, None, None, None], K, GROUP)

    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M] if SLICES > 1 else [BLOCK_N, BLOCK_M], tl.float32)
    for first in range(start, end, SLICES):
        tile = tl.minimum(first + both // TILES, num_col_tiles - 1)
        at = words + (tile.to(tl.int64) * stride_q1)[:, None]
        a = tl.load(at).reshape(SLICES, TILES, 32, 8)
        b = tl.load(at + 256).reshape(SLICES, TILES, 32, 8)
        c = tl.load(at + 512).reshape(SLICES, TILES, 32, 8)
        f = unpack(a, b, c, None, BF16, False, INTERPRETED)

        s, z = next_s, next_z
        tile = tl.minimum(first + SLICES + slices, num_col_tiles - 1)
        next_s, next_z = _load_groups(scale, zero, tile[:, None, None, None, None], K, GROUP)
        # Of each pair of slabs.
        s0, s1, s2, s3 = _by_pair(s, GROUPS)
        z0, z1, z2, z3 = _by_pair(z, GROUPS)

        # The classes of int3_layout.FIELDS, as fragments.py returns them.
        P2: tl.constexpr = 0 if BF16 else 6
        P3: tl.constexpr = 3 if BF16 else 0
        w0 = _slab(f[0], f[1], s0, z0, 0, BF16, INTERPRETED)
        w1 = _slab(f[2], f[3], s0, z0, 0, BF16, INTERPRETED)
        w2 = _slab(f[4], f[5], s1, z1, 3, BF16, INTERPRETED)
        w3 = _slab(f[6], f[7], s1, z1, 3, BF16, INTERPRETED)
        w4 = _slab(f[8], f[9], s2, z2, P2, BF16, INTERPRETED)
        w5 = _slab(f[10], f[11], s2, z2, P2, BF16, INTERPRETED)
        w6 = _slab(f[12], f[13], s3, z3, P3, BF16, INTERPRETED)
        w7 = _slab(f[14], f[15], s3, z3, 3 - P3, BF16, INTERPRETED)
        p0, p1, p2, p3 = _side_by_side(w0, w1), _side_by_side(w2, w3), _side_by_side(w4, w5), _side_by_side(w6, w7)
        k0 = first * 128
        if BLOCK_K == 32:
            acc = _dot(p0, _x_operand(x, offsets, k0, K, EVEN_K), acc, INTERPRETED)
            acc = _dot(p1, _x_operand(x, offsets, k0 + 32, K, EVEN_K), acc, INTERPRETED)
            acc = _dot(p2, _x_operand(x, offsets, k0 + 64, K, EVEN_K), acc, INTERPRETED)
            acc = _dot(p3, _x_operand(x, offsets, k0 + 96, K, EVEN_K), acc, INTERPRETED)
        else:
            p0, p2 = _side_by_side(p0, p1), _side_by_side(p2, p3)
            if BLOCK_K == 64:
                acc = _dot(p0, _x_operand(x, offsets, k0, K, EVEN_K), acc, INTERPRETED)
                acc = _dot(p2, _x_operand(x, offsets, k0 + 64, K, EVEN_K), acc, INTERPRETED)
            else:
                acc = _dot(_side_by_side(p0, p2), _x_operand(x, offsets, k0, K, EVEN_K), acc, INTERPRETED)

    if SLICES > 1:
        acc = sum_slices(acc)
    # Rows of the accumulator are (block, tile, row of the block).
    out = acc.reshape(2, TILES, 16, BLOCK_M).permute(3, 1, 0, 2).reshape(BLOCK_M, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y += tl.program_id(2).to(tl.int64) * M * N
    m = m0 + tl.arange(0, BLOCK_M)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _by_pair(v, GROUPS: tl.constexpr):
    """(..., 2 * groups) as the four (..., block) that pairs of slabs 0..3 need."""
    if GROUPS == 1:
        return v, v, v, v
    else:
        v = v.reshape(v.shape[0], v.shape[1], 8, 2, GROUPS, 2).permute(0, 1, 2, 3, 5, 4)
        if GROUPS == 2:
            v0, v1 = tl.split(v)
            return v0, v0, v1, v1
        else:
            even, odd = tl.split(v.reshape(v.shape[0], v.shape[1], 8, 2, 2, 2, 2))
            v0, v2 = tl.split(even)
            v1, v3 = tl.split(odd)
            return v0, v1, v2, v3


def int3_gemm_triton(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    group_size: int,
    config: GemmConfig | None = None,
) -> Tensor:
    """`int3_ops.int3_linear` by the fused kernel, for x in fp16 or bf16; the other arguments as checked there.

    The weight is what `int3_dequantize` gives in x's dtype, bit for bit; sums are fp32. config: None for the
    default. Needs zero points of at most 127, and those of 3-bit weights are 0..7.
    """
    k, n = x.shape[-1], scale.shape[0]
    rows, qdata, scale, zero_point, some_bias, group = linear_arguments(x, qdata, scale, zero_point, bias, group_size)
    num_rows = rows.shape[0]
    if config is None:
        config = default_gemm_config(num_rows, n, k, group_size, x.dtype, capability_of(x.device))
    y = empty_output((num_rows, n), x.dtype, x.device)
    split_tiles, num_splits = split_of(config, k)
    split = num_splits > 1
    parts = torch.empty((num_splits * num_rows, n), device=x.device, dtype=torch.float32) if split else y
    with on_device(x):
        _gemm_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(num_rows, config.block_m), num_splits)](
            rows,
            qdata,
            scale,
            zero_point,
            some_bias,
            parts,
            num_rows,
            n,
            k,
            rows.stride(0),
            qdata.stride(0),
            qdata.stride(1),
            scale.stride(0),
            zero_point.stride(0),
            split_tiles,
            GROUP=group,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            SLICES=config.slices,
            BF16=x.dtype == torch.bfloat16,
            EVEN_K=k % (128 * config.slices) == 0,
            HAS_BIAS=bias is not None and not split,
            INTERPRETED=interpreted(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
            enable_fp_fusion=True,
        )
        if split:
            sum_splits(parts, num_splits, bias, y)
    return y.to(x.dtype).view(*x.shape[:-1], n)
