"""The decoding kernel against the fp32 reference, by Triton's interpreter on CPU, compiled where there is a GPU.

Tolerance as in test_int3_linear.py: half a unit of the output, and fp32 sums. Cuts are passed in where the point is a
path of the kernel: chunks that end with K or not, sets that a chunk fills or not, one chunk a warp or several.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from launches import DEVICE, guarded_outputs, in_turn, needs_kernels, problem  # noqa: E402
from test_int3_linear import assert_matches_reference  # noqa: E402

from mbq_ao.kernels.gemv_config import MAX_ROWS, GemvConfig, default_gemv_config, gemv_constants  # noqa: E402
from mbq_ao.kernels.int3_gemv import int3_gemv_triton  # noqa: E402
from mbq_ao.kernels.reference import int3_linear_reference  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16]

pytestmark = needs_kernels


def cut(warps: int, col_tiles: int, row_tiles: int = 1, split_k: int = 1) -> GemvConfig:
    return GemvConfig(num_warps=warps, row_tiles=row_tiles, col_tiles=col_tiles, split_k=split_k)


# Every m and every group size with both dtypes, but not every three of them: the interpreter takes a second for each.
@pytest.mark.parametrize(
    "m, group_size, dtype",
    [
        (m, group_size, DTYPES[(i + j) % 2])
        for i, m in enumerate([1, 2, 3, 8, 13])
        for j, group_size in enumerate([32, 64, 128, 256, None])
    ],
    ids=str,
)
def test_rows_and_groups(m: int, group_size: int | None, dtype: torch.dtype) -> None:
    args = problem(m, 40, 576, group_size, dtype)
    assert_matches_reference(int3_gemv_triton(*args), args)


CUTS = in_turn(
    [
        (1, 32, 1024, 128, cut(1, 8)),  # a whole set
        (1, 32, 896, 128, cut(1, 7)),  # all but one column of a set
        (1, 40, 1024, 128, cut(2, 4)),  # half of one, at the end of the scales of the last row
        (1, 33, 2048, 64, cut(2, 4)),  # two chunks a warp, a set each
        (1, 40, 512, 32, cut(2, 2)),
        (1, 40, 2000, 64, cut(2, 3)),  # one and a half sets, chunks beyond K
        (2, 40, 1024, 128, cut(1, 8)),  # two sets
        (4, 40, 512, 32, cut(1, 2)),  # sets of half a tile
        (3, 40, 512, 64, cut(2, 2)),
        (8, 33, 1024, 128, cut(2, 4)),  # four scales at a time
        (5, 40, 512, 32, cut(2, 1)),
        (16, 40, 512, 64, cut(1, 2)),
        (9, 40, 700, None, cut(2, 2)),
        (1, 40, 700, 384, cut(1, 3)),  # groups of several units
    ],
    DTYPES,
)


@pytest.mark.parametrize(("m", "n", "k", "group_size", "config", "dtype"), CUTS, ids=str)
def test_cuts(m: int, n: int, k: int, group_size: int | None, config: GemvConfig, dtype: torch.dtype) -> None:
    args = problem(m, n, k, group_size, dtype)
    assert_matches_reference(int3_gemv_triton(*args, config), args)


@pytest.mark.parametrize("m, dtype", [(1, torch.float16), (3, torch.bfloat16), (11, torch.float16)], ids=str)
def test_several_row_tiles_and_splits(m: int, dtype: torch.dtype) -> None:
    args = problem(m, 40, 300, 64, dtype)
    assert_matches_reference(int3_gemv_triton(*args, cut(2, 1, split_k=2)), args)
    args[4] = None
    assert_matches_reference(int3_gemv_triton(*args, cut(1, 1, row_tiles=2, split_k=2)), args)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # inf - inf, in the interpreter's numpy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 8])
def test_infinities_stay_in_their_row_and_zero_points_are_bytes(m: int, dtype: torch.dtype) -> None:
    args = problem(m, 40, 512, 64, dtype)
    args[3] = torch.randint(0, 256, args[3].shape, dtype=torch.uint8, device=DEVICE)
    args[3][0] = 255
    config = cut(1, 4)
    expected = int3_gemv_triton(*args, config)
    reference = int3_linear_reference(*args)
    assert ((expected.float() - reference).abs() <= 0.004 * reference.abs().amax()).all()
    args[0] = args[0].clone()
    args[0][-1, 5] = float("inf")
    y = int3_gemv_triton(*args, config)
    assert not y[-1].isfinite().any()
    torch.testing.assert_close(y[:-1], expected[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [2.0**-14, 2.0**8])
def test_small_and_large_x(factor: float, dtype: torch.dtype) -> None:
    # fp16 weights are subnormals, and the sum of x is scaled: neither may be lost where x is tiny or huge.
    args = problem(2, 32, 512, 128, dtype)
    args[0] = (args[0].float() * factor).to(dtype)
    args[2] = args[2].float() / factor
    assert_matches_reference(int3_gemv_triton(*args, cut(1, 4)), args)


@pytest.mark.parametrize("split_k", [1, 2])
def test_every_output_is_written_and_nothing_else_is(split_k: int) -> None:
    args = problem(3, 45, 200, 64, torch.float16)
    with guarded_outputs(count=split_k):
        y = int3_gemv_triton(*args, cut(1, 1, split_k=split_k))
    assert_matches_reference(y, args)


def test_memory_beyond_k_and_m_is_not_read() -> None:
    args = problem(3, 40, 200, 64, torch.float16)
    x = torch.full((6, 208), float("nan"), dtype=torch.float16, device=DEVICE)
    x[:3, :200] = args[0]
    args[0] = x[:3, :200]
    assert_matches_reference(int3_gemv_triton(*args), args)


@pytest.mark.parametrize("m", [1, 5])
def test_scales_beyond_the_matrix_are_not_used(m: int) -> None:
    # The last row's groups are the last of the storage: what follows is another tensor's, here not a number.
    args = problem(m, 40, 1024, 128, torch.float16)
    storage = torch.full((40 * 8 + 64,), float("nan"), dtype=torch.float16, device=DEVICE)
    storage[: 40 * 8] = args[2].flatten()
    args[2] = storage[: 40 * 8].view(40, 8)
    for config in (cut(2, 4), cut(2, 3), cut(4, 1)):
        assert_matches_reference(int3_gemv_triton(*args, config), args)


@pytest.mark.parametrize("m", [1, 6])
def test_slices_are_read_in_place(m: int) -> None:
    x, qdata, scale, zero_point, bias, g = problem(m, 96, 512, 64, torch.float16)
    args = [x[:, 128:384], qdata[1:3, 1:3], scale[32:, 2:6], zero_point[32:, 2:6], bias[32:], g]
    assert_matches_reference(int3_gemv_triton(*args), args)


def test_other_strides_and_leading_dimensions() -> None:
    x, qdata, scale, zero_point, bias, g = problem(6, 32, 512, 128, torch.float16)
    plain = int3_gemv_triton(x, qdata, scale, zero_point, bias, g)
    every_other = qdata.repeat_interleave(2, 1)[:, ::2]  # column tiles 1536 apart
    transposed = [t.t().contiguous().t() for t in (x, scale, zero_point)]
    y = int3_gemv_triton(transposed[0].view(6, 512), every_other, *transposed[1:], bias, g)
    torch.testing.assert_close(y, plain, rtol=0, atol=0)
    y = int3_gemv_triton(x.view(2, 3, 512), qdata, scale, zero_point, bias, g)
    torch.testing.assert_close(y, plain.view(2, 3, 32), rtol=0, atol=0)


def test_results_do_not_depend_on_chance_or_on_neighbours() -> None:
    args = problem(8, 64, 1024, 128, torch.bfloat16)
    config = cut(2, 2, split_k=2)
    y = int3_gemv_triton(*args, config)
    torch.testing.assert_close(int3_gemv_triton(*args, config), y, rtol=0, atol=0)
    torch.testing.assert_close(int3_gemv_triton(args[0][3:], *args[1:], config), y[3:], rtol=0, atol=0)


def test_more_rows_are_refused() -> None:
    args = problem(MAX_ROWS + 1, 32, 128, 128, torch.float16)
    with pytest.raises(ValueError, match=r"1 to 16 rows of x, got 17"):
        int3_gemv_triton(*args)
    with pytest.raises(ValueError, match="num_warps must be 1, 2, 4, 8 or 16"):
        GemvConfig(num_warps=3)


@pytest.mark.parametrize(
    ("num_rows", "n", "k", "expected"),
    [
        (1, 4096, 4096, cut(4, 8)),  # the whole of K in flight
        (1, 18944, 3584, cut(4, 7)),
        (1, 3584, 18944, cut(8, 5)),
        (1, 2048, 11008, cut(8, 6, split_k=2)),
        (1, 512, 3584, cut(4, 7)),  # too little to split
        (8, 4096, 4096, cut(8, 4)),
        (16, 4096, 4096, cut(8, 2)),
        (1, 100, 100, cut(1, 1)),
    ],
)
def test_default_config(num_rows: int, n: int, k: int, expected: GemvConfig) -> None:
    assert default_gemv_config(num_rows, n, k, 128, torch.float16) == expected


def test_default_chunks_reach_the_end_of_k() -> None:
    for k in (1, 128, 896, 3420, 4304, 11008, 18944):
        for m in (1, 2, 4, 8, 16):
            for n in (32, 512, 4096, 100000):
                config = default_gemv_config(m, n, k, 128, torch.float16)
                chunk = config.num_warps * config.col_tiles * config.split_k * 128
                assert gemv_constants(m, k, 128, torch.float16, config, 8, 8)["ONE_CHUNK"] == (k <= chunk)
                assert -(-k // chunk) * chunk < 2 * k + 1024 * config.num_warps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16])
def test_compiled_kernel_on_a_real_layer(m: int, group_size: int, dtype: torch.dtype) -> None:
    # Not the least: that tensor cores take fp16 subnormal operands as they are.
    for n, k in ((3584, 18944), (2048, 11008), (4096, 4096)):
        args = problem(m, n, k, group_size, dtype)
        y = int3_gemv_triton(*args)
        assert_matches_reference(y, args)
        torch.testing.assert_close(int3_gemv_triton(*args), y, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = int3_gemv_triton(*args)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, y, rtol=0, atol=0)
