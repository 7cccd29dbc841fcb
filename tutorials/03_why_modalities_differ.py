# %% [markdown]
# # 3. Why modalities differ, and what MBQ does about it
#
# A vision-language model reads many vision tokens and writes a few answer tokens. Ordinary calibration minimises the
# error over all of them alike. [MBQ](https://arxiv.org/abs/2412.19509) starts from a question: does an error on a
# vision token hurt as much as one on an answer token? This page measures that on a small real model, follows the answer
# into the search for scales, and then looks at what comes out, including what does not.
#
# What you need is in [tutorial 2](02_quantize_a_vlm.ipynb).

# %%
import copy
from statistics import mean

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, mbq_config, quantize_
from mbq_ao.demo.data import calibration_batches, load_easy_vqa
from mbq_ao.demo.model import build_demo_vlm

plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})

model, processor = build_demo_vlm()
layers = model.get_decoder().layers
samples = calibration_batches(processor, load_easy_vqa("train"), num_samples=8, seed=0)
calib_data, held_out = samples[:4], samples[4:]  # to search with, and to look at the result with

# %% [markdown]
# ## Which tokens there are
#
# The loss is the negative log-likelihood of the answer. The position that *predicts* an answer token is one before it,
# so that is what "answer token" means from here on.


# %%
def kinds_of_tokens(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the T tokens are vision, and which predict an answer: two bool tensors (T,)."""
    vision = batch["input_ids"][0] == model.config.image_token_id
    answer = torch.cat([batch["labels"][0, 1:] != -100, torch.tensor([False])])
    return vision, answer


vision, answer = kinds_of_tokens(calib_data[0])
print(f"{len(vision)} tokens: {vision.sum()} vision, {answer.sum()} answer, {(~vision & ~answer).sum()} prompt")

# %% [markdown]
# ## Sensitivity
#
# Quantizing changes the output of a layer by some D. To first order the loss changes by the gradient g of the loss with
# respect to that output, times D. So |g| says how much an error hurts, and one backward pass gives it for every token
# of every layer:


# %%
def gradients(batch: dict[str, torch.Tensor], modules: list[nn.Module]) -> list[torch.Tensor]:
    """|g| at the output of each module, mean over its channels: one (T,) tensor a module."""
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)
        outputs[-1].retain_grad()

    hooks = [module.register_forward_hook(keep) for module in modules]
    # No parameter of this model wants a gradient, so the graph begins at the embedded prompt.
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_()))
    model(**batch, use_cache=False).loss.backward()  # given labels, transformers computes the loss
    for hook in hooks:
        hook.remove()
    return [output.grad[0].abs().mean(-1) for output in outputs]


by_token = torch.stack(gradients(calib_data[0], list(layers)))
figure, axes = plt.subplots(figsize=(11, 3.4))
image = axes.imshow(by_token.clamp(min=1e-12), norm=LogNorm(vmin=float(by_token.max()) / 1e4), aspect="auto")
axes.set(title="|g| at the output of each decoder layer: bright means an error there hurts", ylabel="layer")
centre = {name: mask.nonzero().float().mean().item() for name, mask in (("vision", vision), ("answer", answer))}
axes.set_xticks(list(centre.values()), list(centre))
axes.vlines([vision.nonzero().min() - 0.5, vision.nonzero().max() + 0.5], -0.5, 29.5, color="white", lw=1, ls=":")
figure.colorbar(image)
plt.show()

# %% [markdown]
# Between the dotted lines is the image, before it the system prompt, after it the question. The brightest column is the
# token that predicts the answer; the next one predicts the end of the turn, of which the model is certain anyway. Two
# things can be seen at once: an error on a vision token hurts far less than one on the token that answers, and what
# happens on the vision tokens stops to matter in the late layers, when the answer has read from them what it needs.
#
# As a number: r is the mean |g| over the vision tokens, divided by that over the answer tokens. Section 3 of the paper
# bounds the change of the loss with exactly these two means, where the D are the mean errors on either kind of token:
#
# $$ |\Delta L| \;\le\; |g_v|\,|\Delta_v| + |g_a|\,|\Delta_a| \;\propto\; r\,|\Delta_v| + |\Delta_a| $$
#
# It is measured where quantization errors are compared, at the outputs of attention and MLP:

# %%
modules = [module for layer in layers for module in (layer.self_attn, layer.mlp)]
ratios = []
for batch in calib_data:
    vision, answer = kinds_of_tokens(batch)
    ratios.append([(float(g[vision].mean()), float(g[answer].mean())) for g in gradients(batch, modules)])
r = [mean(v for v, _ in column) / mean(a for _, a in column) for column in zip(*ratios, strict=True)]

figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(r[0::2], ".-", label="at the output of attention")
axes.plot(r[1::2], ".-", label="at the output of the MLP")
axes.axhline(1, color="gray", lw=0.8)
axes.text(29, 1.1, "as much as an answer token", ha="right", color="gray")
axes.set(
    xlabel="decoder layer", ylabel="r", yscale="log", ylim=(None, 2), title="how much a vision token's error hurts"
)
axes.legend(frameon=False, loc="lower left")
plt.show()
print(f"median over layers: r = {sorted(r)[len(r) // 2]:.2f};  first layer {r[0]:.2f}, last layer {r[-1]:.3f}")

# %% [markdown]
# On this model the gap is wide: an answer token counts as much as twenty to fifty vision tokens in the first half of
# the layers, and as hundreds and more in the second. (The paper finds about ten on models of 7B and more, with answers
# of many words. Here they are a word and the end of the turn.) There are 64 vision tokens for every two that answer, so
# they are not nothing; but counting all tokens alike gives every one of them a weight of 1, where it should be r.
#
# ## What the search does with it
#
# [Tutorial 1](01_quantize_a_linear.ipynb) ended with the remedy against rounding errors: scale some columns of the
# weight up and the inputs down. For a group of linears that read the same input x, s is mean|x|^alpha for each channel,
# and ten alphas from 0, which is plain rounding, to 0.9 are tried. MBQ takes the one that makes the bound above
# smallest (equation 5 of the paper):
#
# $$ \min_s \;\; r\,\big| W x_v - Q(W s)\, s^{-1} x_v \big| + \big| W x_a - Q(W s)\, s^{-1} x_a \big| $$
#
# AWQ takes the one with the least error over all tokens. `balance=False` does the same here, on the same data and with
# everything else equal, so the two can be compared fairly. Three layers will do: an early one, one in the middle, a
# late one.

# %%
chosen = (2, 14, 26)


def calibrated(balance: bool):
    """A copy of the model with these three layers quantized, and the report."""
    copied = copy.deepcopy(model)
    blocks = [copied.get_decoder().layers[index] for index in chosen]
    config = mbq_config(calib_data, recipe="mbq", group_size=64, balance=balance, blocks=blocks, n_grid=10)
    return copied, quantize_(copied, config, progress=False)


mbq_model, mbq_report = calibrated(balance=True)
awq_model, awq_report = calibrated(balance=False)

for group in mbq_report.groups:  # the sensitivity that we measured by hand is the library's
    index = 2 * int(group.block.rpartition(".")[2]) + group.linears[0].startswith("mlp")
    assert abs(group.sensitivity_raw - r[index]) < 1e-3 * r[index]

# %%
figure, axes = plt.subplots(3, 4, figsize=(11, 6.5), sharex=True)
alphas = [k / 10 for k in range(10)]
for panel, balanced, even in zip(axes.flat, mbq_report.groups, awq_report.groups, strict=True):
    for report, color, name in ((even, "tab:gray", "all alike"), (balanced, "tab:orange", "balanced")):
        losses = [loss / report.loss_rtn for loss in report.losses]
        panel.plot(alphas, losses, color=color, label=name)
        panel.plot(report.alpha, report.loss / report.loss_rtn, "o", color=color)
    linears = ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in balanced.linears)
    panel.set_title(f"layer {balanced.block.rpartition('.')[2]}: {linears}", fontsize=9)
    panel.set_ylim(0.5, 1.5)
axes[0, 0].legend(frameon=False)
axes[1, 0].set_ylabel("loss / loss of plain rounding")
axes[2, 1].set_xlabel("alpha")
figure.tight_layout()
plt.show()
different = sum(a.alpha != b.alpha for a, b in zip(mbq_report.groups, awq_report.groups, strict=True))
print(f"MBQ and the AWQ-like search chose differently for {different} of {len(mbq_report.groups)} groups")

# %% [markdown]
# Each panel is one group; the dot is the alpha that was taken. The curves differ because they weigh the same errors
# differently, and where their lowest points differ, so does the quantized model. (The library raises an r below the
# median over the layers to that median, as the authors' code does: a layer must not forget its vision tokens
# altogether.)
#
# ## What is left of the error
#
# Now the three quantized layers get inputs that the search has not seen, four other samples, and their outputs are
# compared with the original's, on the vision tokens and on the answer tokens apart.

# %%
rounded = copy.deepcopy(model)
quantize_(
    rounded,
    Int3WeightOnlyConfig(group_size=64),
    lambda module, name: isinstance(module, nn.Linear) and any(f"language_model.layers.{i}." in name for i in chosen),
)
versions = {"plain rounding": rounded, "AWQ-like": awq_model, "MBQ": mbq_model}


def call_of(layer: nn.Module, batch: dict[str, torch.Tensor]) -> tuple:
    """What the layer is called with, and what it returns, when the model runs this batch."""
    calls = []
    hook = layer.register_forward_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    model(**batch, use_cache=False)  # a cache would have the layer's keys already when it is called again
    hook.remove()
    return calls[0]


@torch.no_grad()
def errors_left(index: int) -> dict[str, tuple[float, float]]:
    """Of each version of a layer: mean |error| at its output on vision and on answer tokens."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
    for batch in held_out:
        args, kwargs, exact = call_of(layers[index], batch)
        vision, answer = kinds_of_tokens(batch)
        for name, version in versions.items():
            error = (version.get_decoder().layers[index](*args, **kwargs) - exact)[0].abs().mean(-1)
            found[name].append((float(error[vision].mean()), float(error[answer].mean())))
    return {name: tuple(map(mean, zip(*errors, strict=True))) for name, errors in found.items()}


left = {index: errors_left(index) for index in chosen}
print("error left, plain rounding = 100      vision tokens   answer tokens   r * vision + answer")
for index, errors in left.items():
    v0, a0 = errors["plain rounding"]
    ratio = mean(r[2 * index : 2 * index + 2])
    for name, (v, a) in errors.items():
        bound = (ratio * v + a) / (ratio * v0 + a0)
        print(f"layer {index:<3} {name:<25} {100 * v / v0:15.1f} {100 * a / a0:15.1f} {100 * bound:21.1f}")

# %% [markdown]
# Read the table by column. Both searches leave less error on the vision tokens than plain rounding, in every layer. On
# the answer tokens they differ: in the middle and the late layer the AWQ-like search, which hardly sees them among so
# many others, leaves them about as they were, and MBQ takes a part of their error away, at the price of a little more
# on the vision tokens of the middle layer. In the early layer both chose the same scales. The last column is what the
# loss is expected to see, and it follows the answer tokens, as r is small.
#
# ## What this shows, and what it does not
#
# * On this model answer tokens are far more sensitive than vision tokens, the more so the later the layer, and the
#   balanced search moves error away from them, on samples that it has not seen.
# * It is three layers, four samples and answers of two tokens. With so few answer tokens the search can be misled by
#   chance, and r itself moves by a factor of two or so with the samples. Use 16 to 128.
# * Errors of layers are not the model's quality. Whether the quantized model *answers* better is another measurement,
#   and the README has it, method by method: both searches are better than plain rounding, which of the two is better
#   differs between models, and weights fitted to their inputs, the default recipe, are better than either.
#
# Next: [4. compile and generate](04_compile_and_generate.ipynb), or [5. how to
# measure](05_evaluate_with_lm_eval.ipynb).
