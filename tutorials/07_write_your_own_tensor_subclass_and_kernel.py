# %% [markdown]
# # 7. Write your own tensor subclass and kernel
#
# This library is a few tensor subclasses with kernels behind them, and calibration that knows nothing of either. This
# page builds a small one of its own, from the first bit to `torch.compile`: a weight of 2 bits. It has every part that
# `MBQInt3Tensor` has, in the order in which you would write them:
#
# 1. what is computed, in plain PyTorch: the reference;
# 2. where the bits lie: pack and unpack;
# 3. the kernel, in Triton;
# 4. a custom op, the door to the kernel;
# 5. the tensor subclass, which turns `F.linear` into that op;
# 6. a config, so that `quantize_` makes such weights;
# 7. `torch.compile`, and tests.
#
# Triton compiles for GPUs, and it has an interpreter that runs a kernel on the CPU, one program after the other. It is
# slow, and right, which is what development and CI need. It must be asked for before Triton is imported:

# %%
import os

import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import mbq_ao  # noqa: F401  (imports torchao without its start-up messages)

print("kernels run on", device)

# %%
import triton
import triton.language as tl
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

# %% [markdown]
# ## 1. What is computed
#
# Two bits are four levels. A group of 32 neighbouring weights shares a scale d, and the levels lie evenly around zero:
#
# $$ q \in \{0, 1, 2, 3\}, \qquad w' = (q - 1.5)\, d $$
#
# With d = max|w| / 2 no weight is more than d/2 away from a level. In plain PyTorch, written to be read:

# %%
GROUP = 32


def choose_scale(w: Tensor) -> Tensor:
    """One scale a group: (N, K / GROUP) for a weight (N, K)."""
    return w.unflatten(1, (-1, GROUP)).abs().amax(-1).clamp(min=1e-5) / 2


def quantize(w: Tensor, scale: Tensor) -> Tensor:
    """The codes 0 .. 3: (N, K) uint8."""
    levels = w / scale.repeat_interleave(GROUP, 1) + 1.5
    return levels.round().clamp(0, 3).to(torch.uint8)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    return (q.to(scale.dtype) - 1.5) * scale.repeat_interleave(GROUP, 1)


torch.manual_seed(0)
w = torch.randn(48, 96)
scale = choose_scale(w)
error = (dequantize(quantize(w, scale), scale) - w).abs() / scale.repeat_interleave(GROUP, 1)
print(f"largest error: {error.max():.2f} steps")

# %% [markdown]
# ## 2. Where the bits lie
#
# Four codes make a byte, the first in the lowest bits. A layout has one function that packs and one that unpacks, and a
# test that they are each other's inverse. (That of the 3-bit weight follows the tensor cores' fragments instead, see
# [tutorial 1](01_quantize_a_linear.ipynb).)


# %%
def pack(q: Tensor) -> Tensor:
    """(N, K) codes -> (N, K / 4) bytes."""
    a, b, c, d = q.unflatten(1, (-1, 4)).unbind(-1)
    return a | b << 2 | c << 4 | d << 6


def unpack(qdata: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([qdata >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)


every_byte = torch.arange(256, dtype=torch.uint8).view(4, 64)
assert torch.equal(pack(unpack(every_byte)), every_byte)
print("the byte 0b11100100 holds the codes", unpack(torch.tensor([[0b11100100]], dtype=torch.uint8))[0].tolist())

# %% [markdown]
# ## 3. The kernel
#
# A kernel is what one *program* does; many run at once, each on its own tile of the output, here BLOCK_M rows by
# BLOCK_N columns. It walks along K one group at a time: load the inputs, load the bytes, shift the codes out, multiply
# by the scale in registers, multiply with the inputs. The full weight never exists in memory.
#
# Masks keep tiles inside the matrices where M and N are no multiples of the block. K is one: the tensor below sees to
# it.


# %%
@triton.jit
def int2_linear_kernel(
    x_ptr, qdata_ptr, scale_ptr, y_ptr, M, N, K, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, GROUP):
        k = start + tl.arange(0, GROUP)
        x = tl.load(x_ptr + m[:, None] * K + k, mask=m[:, None] < M, other=0.0)
        byte = tl.load(qdata_ptr + n[:, None] * (K // 4) + k // 4, mask=n[:, None] < N, other=0)
        q = (byte >> (k % 4 * 2)[None, :]) & 3
        d = tl.load(scale_ptr + n * (K // GROUP) + start // GROUP, mask=n < N, other=0.0)
        w = (q.to(tl.float32) - 1.5) * d[:, None].to(tl.float32)
        y = tl.dot(x, tl.trans(w.to(x.dtype)), acc=y, input_precision="ieee")
    tl.store(y_ptr + m[:, None] * N + n, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n < N))


# %% [markdown]
# Each byte is loaded four times here, once for each of its codes, and BLOCK_M and BLOCK_N are fixed. On a GPU this is
# where the work begins: loads of sixteen bytes, a layout that suits them, blocks chosen by measuring on the very
# device. None of that changes anything around the kernel, and the interpreter cannot tell you which is faster.
#
# ## 4. The op
#
# `torch.library.custom_op` makes a function an operator of PyTorch's: opaque to `torch.compile`, which sees its name
# and, from the *fake* version, the shape and dtype of what it returns. The choice of code by device is made inside, so
# callers need not know.


# %%
@torch.library.custom_op("tutorial::int2_linear", mutates_args=())
def int2_linear(x: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    """y = x @ dequantize(unpack(qdata), scale).T.  x: (..., K); qdata: (N, K / 4); scale: (N, K / GROUP)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (M, K), N = rows.shape, qdata.shape[0]
    y = rows.new_empty(M, N)
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 32))
    int2_linear_kernel[grid](rows, qdata, scale, y, M, N, K, GROUP=GROUP, BLOCK_M=16, BLOCK_N=32)
    return y.view(*x.shape[:-1], N)


@int2_linear.register_fake
def _(x: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


# %% [markdown]
# ## 5. The tensor subclass
#
# `TorchAOBaseTensor` does most of it. It wants to know which tensors are inside (`tensor_data_names`) and what else
# (`tensor_attribute_names`), and in return knows how to copy, move, print, flatten for the compiler and serialize.
# `__new__` makes the outer tensor, which has a shape and a dtype and no memory of its own.


# %%
class Int2Tensor(TorchAOBaseTensor):
    """A (N, K) weight of 2 bits, K a multiple of GROUP.  qdata: (N, K / 4) uint8; scale: (N, K / GROUP)."""

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["shape"]

    def __new__(cls, qdata: Tensor, scale: Tensor, shape: tuple[int, int]) -> "Int2Tensor":
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=scale.dtype, device=scale.device)

    def __init__(self, qdata: Tensor, scale: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.qdata, self.scale = qdata, scale

    @classmethod
    def from_hp(cls, w: Tensor) -> "Int2Tensor":
        """Quantize a weight. Raises ValueError if it is not a matrix whose width is a multiple of GROUP."""
        if w.dim() != 2 or w.shape[1] % GROUP:
            raise ValueError(f"a weight must be (N, K) with K a multiple of {GROUP}, got {tuple(w.shape)}")
        scale = choose_scale(w)
        return cls(pack(quantize(w, scale)), scale, w.shape)

    def dequantize(self) -> Tensor:
        return dequantize(unpack(self.qdata), self.scale)


# %% [markdown]
# It cannot compute yet. `implements` registers what it does where it is an argument: for the function `F.linear`, as
# modules call it, and for the op `aten.linear`, as other code does. What is not registered raises an error, which is
# better than silently unpacking.


# %%
@Int2Tensor.implements(torch.ops.aten.linear.default)
@Int2Tensor.implements_torch_function(nn.functional.linear)
def _(func, types, args, kwargs):
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = int2_linear(input, weight.qdata, weight.scale)
        return y if bias is None else y + bias

    return linear(*args, **kwargs)


weight = Int2Tensor.from_hp(torch.randn(100, 128, device=device))
x = torch.randn(3, 5, 128, device=device)
y = nn.functional.linear(x, weight)
print(tuple(y.shape), f"off by {(y - x @ weight.dequantize().T).abs().max():.1e} from the reference")

# %% [markdown]
# ## 6. The config
#
# torchao's `quantize_` walks over the modules of a model and calls the handler that is registered for the config's
# class.


# %%
class Int2WeightOnlyConfig(AOBaseConfig):
    """2-bit weights by plain rounding."""


@register_quantize_module_handler(Int2WeightOnlyConfig)
def _(module: nn.Module, config: Int2WeightOnlyConfig) -> nn.Module:
    module.weight = nn.Parameter(Int2Tensor.from_hp(module.weight.detach()), requires_grad=False)
    return module


model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).to(device)
quantize_(model, Int2WeightOnlyConfig())
print(type(model[0].weight).__name__, "of", tuple(model[0].weight.shape))
inside = model[0].weight
bits = [8 * part.nbytes / inside.numel() for part in (inside.qdata, inside.scale)]
print(f"bits a weight: {bits[0]:g} for the codes and {bits[1]:g} for the scale, which is float32 here")

# %% [markdown]
# ## 7. Compile it
#
# The compiler takes the subclass apart, as its `__tensor_flatten__` says how, and traces through `F.linear` to the op.
# The graph is what it would be if the op had been called by hand:

# %%
from torch._dynamo.backends.common import aot_autograd


def print_graph(graph_module, inputs):
    print(*(node.target for node in graph_module.graph.nodes if node.op == "call_function"), sep="\n")
    return graph_module.forward


compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=print_graph))
x = torch.randn(7, 128, device=device)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x))

# %% [markdown]
# ## Test it
#
# What this library asks of its own kernels, in small. The oracle is the reference, not the kernel itself. Sizes are
# odd, so that masks are wrong where they can be. The tolerance comes from the arithmetic: both sides add K fp32
# products, in another order, so they differ by rounding errors of about sqrt(K) times 6e-8 of the sum's terms.


# %%
def test_kernel_against_reference() -> None:
    for M, N, K in [(1, 1, 32), (3, 33, 64), (17, 100, 128), (40, 31, 96)]:
        x, weight = torch.randn(M, K, device=device), Int2Tensor.from_hp(torch.randn(N, K, device=device))
        expected = x.double() @ weight.dequantize().double().T
        terms = x.double().abs() @ weight.dequantize().double().abs().T
        error = (nn.functional.linear(x, weight) - expected).abs()
        assert (error <= 2 * K**0.5 * 2**-24 * terms).all(), (M, N, K)


def test_no_weight_is_more_than_half_a_step_off() -> None:
    w = torch.randn(20, 64)
    weight = Int2Tensor.from_hp(w)
    step = weight.scale.repeat_interleave(GROUP, 1)
    assert ((weight.dequantize() - w).abs() <= step / 2 * (1 + 1e-6)).all()


def test_state_dict_round_trip() -> None:
    saved = model.state_dict()
    other = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).to(device)
    other.load_state_dict(saved, assign=True)
    assert torch.equal(other(x), model(x))


def test_what_pytorch_thinks_of_the_op() -> None:
    torch.library.opcheck(int2_linear, (x, model[0].weight.qdata, model[0].weight.scale))


def test_bad_width() -> None:
    try:
        Int2Tensor.from_hp(torch.randn(4, 33))
    except ValueError as error:
        print(error)
    else:
        raise AssertionError("a width of 33 was accepted")


for test in [value for name, value in dict(globals()).items() if name.startswith("test_")]:
    test()
    print(test.__name__, "passed")

# %% [markdown]
# ## On a GPU
#
# The same file runs there, compiled instead of interpreted. What changes:
#
# * float16 and bfloat16 inputs use the tensor cores; the tolerance then comes from their precision, not float32's.
# * Other block sizes are faster for one row than for a thousand. This library has two kernels, one for decoding and one
#   for prompts, and `mbq_ao.tune` measures their configurations on the GPU at hand.
# * Masks that the interpreter forgives, as it reads from ordinary memory, can fault. Run `compute-sanitizer` once.
#
# ## Where this library does more
#
# | here | there |
# |---|---|
# | `choose_scale`, `quantize`, `dequantize` | `mbq_ao/quant_primitives.py` |
# | `pack`, `unpack` | `mbq_ao/kernels/int3_layout.py` |
# | the kernel | `mbq_ao/kernels/int3_gemv.py`, `int3_gemm.py` |
# | the op | `mbq_ao/kernels/int3_ops.py`, with a backward for x, and the CPU's own kernel |
# | `Int2Tensor` | `mbq_ao/int3_tensor.py`, `packed_weight.py`: slices, shards, experts, `act_pre_scale` |
# | the config | `mbq_ao/config.py` |
#
# Plain rounding to 2 bits ruins most models. What calibration would need of this tensor is two methods, `stand_in` and
# `quantize` of the `WeightQuantizer` in `mbq_ao/calibration/settings.py`: the search never looks inside a weight.
