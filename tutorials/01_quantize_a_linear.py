# %% [markdown]
# # 1. Quantize a linear layer and look at its bits
#
# A language model is mostly matrices of linear layers, and generating a token reads all of them once. Storing a weight
# in 3 bits instead of 16 makes the model five times smaller, and what has to be read for a token as well. This page
# takes one linear layer to 3 bits and looks at everything that happens: how a number becomes a code, where the bits of
# the code lie in memory, how large the error is and why, and what PyTorch sees of it.
#
# It needs no GPU, no model and no data: `python 01_quantize_a_linear.py`.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, MBQInt3Tensor, quantize_

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)

layer = nn.Linear(512, 256)  # 512 inputs (K), 256 outputs (N)
nn.init.normal_(layer.weight, std=0.02)  # trained weights are roughly bell-shaped, so these are as well
original = layer.weight.detach().clone()

# %% [markdown]
# One call quantizes it. (`torchao.quantization.quantize_` does the same: only the config is ours.) A group is 64
# neighbouring weights of a row: they share a scale and a zero point.

# %%
quantize_(layer, Int3WeightOnlyConfig(group_size=64))
weight = layer.weight
print(layer)
print("still a tensor of the same shape:", isinstance(weight, torch.Tensor), tuple(weight.shape), weight.dtype)

# %% [markdown]
# The module is the same `nn.Linear`. What changed is the kind of tensor that it holds: an `MBQInt3Tensor`, which looks
# to PyTorch like a float32 matrix of 256 x 512 and has these three tensors inside:

# %%
for name in ("qdata", "scale", "zero_point"):
    inside = getattr(weight, name)
    print(f"{name:<11} {inside.dtype!s:<14} {tuple(inside.shape)!s:<20} {inside.nbytes:>6} bytes")

# %% [markdown]
# ## From a number to a code
#
# Three bits tell eight values apart, so each group gets eight levels, evenly spaced from its smallest weight to its
# largest. The *scale* d is the distance between two levels, the *zero point* z is the number of the level that means 0:
#
# $$ d = \frac{\max w - \min w}{7}, \qquad z = \mathrm{round}\Big(\frac{-\min w}{d}\Big), \qquad
#    q = \mathrm{round}\Big(\frac{w}{d}\Big) + z, \qquad w' = (q - z)\, d $$
#
# q is the code, 0 to 7, and all that is stored of the weight; w' is what the layer computes with. By hand, for the
# first group of the first row:

# %%
group = original[0, :64]
d = (group.max() - group.min()) / 7
z = (-group.min() / d).round()
q = ((group / d).round() + z).clamp(0, 7)
print(f"scale d = {d:.6f}, zero point z = {z:.0f}")
print("first weights ", " ".join(f"{w:7.4f}" for w in group[:8]))
print("their codes   ", " ".join(f"{code:7.0f}" for code in q[:8]))
print("what they mean", " ".join(f"{w:7.4f}" for w in ((q - z) * d)[:8]))

assert d == weight.scale[0, 0] and z == weight.zero_point[0, 0]
assert torch.equal((q - z) * d, weight.dequantize()[0, :64])  # the library computed the very same

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(3, 2))
for level in range(8):
    left.axhline((level - z) * d, color="tab:orange", lw=0.8)
    left.text(64.5, (level - z) * d, str(level), color="tab:orange", va="center")
left.vlines(range(64), group, (q - z) * d, color="tab:red", lw=1)
left.plot(group, ".", color="tab:blue", ms=5)
left.set(title="64 weights, the 8 levels of their group, and the errors", xlabel="column", xlim=(-1, 64))
right.hist(group, bins=40, color="tab:blue", alpha=0.4)
right.set(title="how many weights have which code", xlabel="weight", ylim=(0, 7))
for level in range(8):
    number = int((q == level).sum())
    right.text((level - z) * d, 6.4, number, color="tab:orange", ha="center")
    right.axvline((level - z) * d, color="tab:orange", lw=0.8, ymax=0.88)
plt.show()

# %% [markdown]
# Most weights crowd around the middle levels, and the two at the ends serve a few: a single large weight stretches the
# grid of its whole group. That is why groups are small, and it is the reason for everything that calibration does
# ([tutorial 3](03_why_modalities_differ.ipynb)).
#
# ## Where the bits lie
#
# 256 x 512 codes of 3 bits are 49,152 bytes, and that is exactly what `qdata` takes. The computer knows no 3-bit
# numbers, so codes are packed: the matrix is cut into tiles of 32 rows and 128 columns, and a tile is three planes of
# 256 16-bit words. A word has room for five codes, and one bit is left over:

# %%
num_row_tiles, num_col_tiles, planes, lanes, halves = weight.qdata.shape
print(f"{num_row_tiles} x {num_col_tiles} tiles, each of {planes} planes x {lanes * halves} words of 16 bits")
print("bits a weight:", weight.qdata.nbytes * 8 / weight.numel())
word = int(weight.qdata[0, 0, 0, 0, 0]) & 0xFFFF
bits = f"{word:016b}"
print("the first word:", bits[0], "|", " ".join(bits[i : i + 3] for i in range(1, 16, 3)))
print("as codes:      ", [word >> shift & 7 for shift in range(0, 15, 3)], "and a spare bit,", word >> 15)

# %% [markdown]
# The fifteen codes of three words, one of each plane, have three spare bits between them, and these are the sixteenth
# code. Nothing is wasted.
#
# The five codes of a word are not neighbours in the matrix. To see where they are from, fill one plane of a tile with
# ones, leave the rest zero, and unpack: 7 appears wherever a code lies in this plane, and a power of two where one bit
# of the code does.

# %%
from mbq_ao.kernels.int3_layout import unpack_int3

planes_of = torch.zeros(32, 128)
for plane in range(3):
    tile = torch.zeros(1, 1, 3, 32, 8, dtype=torch.int16)
    tile[0, 0, plane] = -1  # all bits set
    codes = unpack_int3(tile, 32, 128)
    planes_of[codes == 7] = plane
    planes_of[(codes > 0) & (codes < 7)] = 3  # bits of it in every plane

tile = torch.zeros(1, 1, 3, 32, 8, dtype=torch.int16)
tile[0, 0, 0, 0, 0] = 0x7FFF  # the five codes of the first word
first_word = unpack_int3(tile, 32, 128).nonzero()

figure, axes = plt.subplots(figsize=(10, 2.9))
image = axes.imshow(planes_of, cmap=plt.get_cmap("Pastel1", 4), vmin=-0.5, vmax=3.5, aspect="auto")
axes.plot(first_word[:, 1], first_word[:, 0], "k.", ms=7, label="the five codes of the first word")
axes.set(title="a tile of 32 x 128 weights: the plane that holds each", xlabel="column", ylabel="row")
axes.legend(loc="lower right")
figure.colorbar(image, ticks=range(4)).ax.set_yticklabels(["0", "1", "2", "all three"])
plt.show()
print("the five codes of the first word are those of (row, column):", [tuple(place) for place in first_word.tolist()])

# %% [markdown]
# The pattern is the one in which a GPU's tensor cores want their operands: 16 rows by 16 columns at a time, spread over
# the 32 threads of a warp. A thread loads sixteen bytes of each plane, masks, shifts, and has its operands: no lookup,
# no exchange with other threads. `mbq_ao/kernels/int3_layout.py` draws it bit by bit.
#
# ## Size
#
# Scales and zero points come on top of the 3 bits: here 32 + 8 bits for every 64 weights. Smaller groups fit better and
# cost more; in bfloat16, in which models are usually served, a scale takes half as much.

# %%
print("group size    bits a weight            relative error")
print("              float32   bfloat16       of the weight")
errors = {}
for group_size in (32, 64, 128, None):
    in_fp32 = MBQInt3Tensor.from_hp(original, group_size)
    in_bf16 = MBQInt3Tensor.from_hp(original.bfloat16(), group_size)
    sizes = [8 * w.quantized_nbytes() / w.numel() for w in (in_fp32, in_bf16)]
    errors[group_size] = ((in_fp32.dequantize() - original).norm() / original.norm()).item()
    name = "one a row" if group_size is None else group_size
    print(f"{name!s:<12}  {sizes[0]:7.3f}   {sizes[1]:8.3f}       {errors[group_size]:12.1%}")

# %% [markdown]
# ## Error
#
# Can the error be understood? A weight is rounded to the nearest of levels that are d apart, so it is off by at most
# d/2, and by any amount up to that with about the same chance. A number spread evenly over an interval of width d has
# the standard deviation d / sqrt(12). So the typical error of a layer should be its typical d, divided by 3.46:

# %%
error = weight.dequantize() - original
expected = weight.scale.square().mean().sqrt() / 12**0.5
print(f"largest error, in units of d: {(error.unflatten(1, (-1, 64)).abs() / weight.scale[..., None]).max():.2f}")
print(f"root mean square error: {error.square().mean().sqrt():.6f}, expected from d: {expected:.6f}")

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6))
limit = original[:16, :64].abs().max().item()
shown = {"weights": original, "after quantizing": weight.dequantize(), "error": error}
for panel, (title, values) in zip(axes, shown.items(), strict=True):
    panel.imshow(values[:16, :64], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    panel.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# In the error no pattern is left of the weights, which is good: in a sum over 512 inputs such noise mostly cancels, as
# the weights themselves do. So the output is off by the same share as the weight, as long as all inputs are about as
# large:

# %%
x = torch.randn(1000, 512)


def output_error(x: torch.Tensor, linear: nn.Linear) -> float:
    """How far the layer's output is from that of the original weight, relative to that."""
    exact = nn.functional.linear(x, original, linear.bias)
    return ((linear(x) - exact).norm() / exact.norm()).item()


print(f"weight off by {errors[64]:.1%}, output by {output_error(x, layer):.1%}")

# %% [markdown]
# They are not, in a language model: a few channels of the activations are many times as large as the rest, and the
# errors of the weights that they are multiplied with are all that counts. There is a remedy that costs nothing (it is
# AWQ's, and MBQ builds on it): multiply these columns of the weight by s > 1 *before* rounding, and divide the inputs
# by s. The product is the same, but the rounding error of these columns is divided by s as well. `act_pre_scale` is
# where our tensor keeps 1/s.

# %%
loud = torch.ones(512)
loud[::64] = 30.0  # one channel in every group is thirty times as large as the others
print(f"8 loud channels of 512: output off by {output_error(x * loud, layer):.1%}")

for factor in (1.5, 2.0, 3.0, 6.0):
    s = torch.where(loud > 1, factor, 1.0)
    scaled = nn.Linear(512, 256)
    scaled.bias = layer.bias
    scaled.weight = nn.Parameter(MBQInt3Tensor.from_hp(original * s, 64, act_pre_scale=1 / s), requires_grad=False)
    print(f"    their columns times {factor}: off by {output_error(x * loud, scaled):.1%}")

# %% [markdown]
# Too small an s leaves the error of the loud columns, too large a one stretches the grid of their neighbours. The best
# lies in between, and calibration is the search for it, with real inputs and for every layer of a model. Where it can,
# it hides 1/s in the layer before, so that nothing is left to be multiplied.
#
# ## What runs
#
# `layer(x)` is `F.linear(x, weight, bias)`. The tensor subclass sees that call and answers it with an op of its own. A
# dispatch mode, which sees every op that PyTorch runs, shows it:

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class PrintOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        print(func)
        return func(*args, **(kwargs or {}))


with torch.no_grad(), PrintOps():
    layer(x)

# %% [markdown]
# One op, and no other: it gets the packed tensors as they are. Behind it are Triton kernels on an NVIDIA GPU, a C++
# kernel on a CPU, and plain PyTorch everywhere else; what it must compute is written down in
# `mbq_ao/kernels/reference.py`.
#
# `torch.compile` sees the same thing. A backend that prints the graph and runs it unchanged:

# %%
from torch._dynamo.backends.common import aot_autograd


def print_graph(graph_module, inputs):
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            print(node.target)
    return graph_module.forward


block = nn.Sequential(layer, nn.GELU())
compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=print_graph))
with torch.no_grad():
    assert torch.equal(compiled(x), block(x))

# %% [markdown]
# The subclass is gone: the compiler took it apart into its three tensors, and the whole layer is one node that it
# cannot see into and need not. There is no graph break (`fullgraph=True` would have raised), and what is around the op
# is fused as always. One way out remains for anything that is not a linear layer, `weight.dequantize()`, and everything
# else says so clearly:

# %%
try:
    weight.exp()
except NotImplementedError as error:
    print(error)

# %% [markdown]
# ## What to take along
#
# * A weight is a 3-bit code; 64 of them share a scale and a zero point. At group size 128 in bfloat16 that is 3.19
#   bits.
# * Rounding alone leaves an error of d / sqrt(12) a weight. It cannot be avoided, but it can be moved to where it does
#   not matter, by scaling columns.
# * PyTorch sees a tensor and one op. Saving, moving, compiling and sharding work on the tensor inside.
#
# Next: [2. a whole vision-language model](02_quantize_a_vlm.ipynb).
