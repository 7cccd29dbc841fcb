# %% [markdown]
# # 6. Your own model and your own data
#
# Two things are yours: conversations, in some file, and a model, perhaps one that no library has heard of. This page
# makes calibration data of a JSONL file and looks at what came out; then it writes a vision-language model from
# scratch, quantizes it, reads the report, survives an interruption, saves and loads.
#
# What you need is in [tutorial 2](02_quantize_a_vlm.ipynb).

# %%
import copy
import json
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor, nn

from mbq_ao import calibration_data, load_safetensors, mbq_config, quantize_, save_safetensors
from mbq_ao.demo.data import load_easy_vqa
from mbq_ao.demo.model import build_demo_vlm

plt.rcParams["figure.dpi"] = 72
temporary = tempfile.TemporaryDirectory()  # gone at the end, with all that this page writes
folder = Path(temporary.name)

# %% [markdown]
# ## Conversations in a file
#
# One line a conversation, in one of the forms that are common: LLaVA's and ShareGPT's `conversations`, chat `messages`
# as transformers has them, or plain columns. Images are paths here. The last line is broken on purpose, and the one
# before it names an image that is not there.

# %%
rows = load_easy_vqa("train")[::2000][:6]
lines = []
for number, row in enumerate(rows):
    row.image.save(folder / f"{number}.png")
    turns = [{"from": "human", "value": f"<image>\n{row.question}"}, {"from": "gpt", "value": row.answer}]
    lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
lines.append(json.dumps({"image": "missing.png", "question": "what is it?", "answer": "nobody knows"}))
lines.append('{"image": "0.png", "questi')
(folder / "conversations.jsonl").write_text("\n".join(lines))
print(lines[0])

# %% [markdown]
# `calibration_data` needs the file and the processor of the model, which knows how a conversation is written as tokens.
# Bad rows are skipped, and one warning names them; `strict=True` raises instead.

# %%
_, processor = build_demo_vlm()  # only its processor is used here
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    calib_data = calibration_data(folder / "conversations.jsonl", processor, n_samples=8, image_folder=folder)
print(str(caught[0].message).replace(str(folder), "FOLDER"))

# %% [markdown]
# ## Look at the labels
#
# Everything depends on them: they say which tokens the model has to get right. A template that is understood wrongly
# shows here at once, so look. Of the first batch, without its image, and then of all of them by position:

# %%
image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
ids, labels = calib_data[0]["input_ids"][0], calib_data[0]["labels"][0]
print("prompt:", repr(processor.tokenizer.decode(ids[(labels == -100) & (ids != image_token)])))
print("answer:", repr(processor.tokenizer.decode(ids[labels != -100])))

longest = max(batch["input_ids"].shape[1] for batch in calib_data)
kinds = torch.full((len(calib_data), longest), -1)
for line, batch in enumerate(calib_data):
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    kinds[line, : len(ids)] = (ids == image_token) + 2 * (labels != -100)

figure, axes = plt.subplots(figsize=(11, 1.8))
image = axes.imshow(
    kinds, cmap=ListedColormap(["white", "lightgray", "tab:blue", "black"]), vmin=-1, vmax=2, aspect="auto"
)
axes.set(xlabel="position", ylabel="batch", title="gray: prompt, blue: vision tokens, black: the answer, with labels")
plt.show()

# %% [markdown]
# The answers end with the end of the turn: to stop is part of what the model has to get right.
#
# ## A model of your own
#
# This one is in no list, and inherits from nothing but `nn.Module`: names, norm and attention are its own, there is no
# config. It has a fused projection for q, k and v, and an MLP with a GELU. The weights are random, so its answers mean
# nothing; what is shown is the way.


# %%
class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_mixing, self.before_thinking = Norm(width), Norm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_mixing(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.shrink(nn.functional.gelu(self.grow(self.before_thinking(x))))


class HomeMadeVLM(nn.Module):
    """Patches of the image, embedded, take the places of the `<image>` tokens."""

    def __init__(self, vocabulary: int, image_token: int, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.image_token = image_token
        self.words = nn.Embedding(vocabulary, width)
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.layers = nn.ModuleList(Layer(width, heads=4) for _ in range(depth))
        self.last_norm, self.head = Norm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        seen = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = x.masked_scatter((input_ids == self.image_token)[..., None], seen)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last_norm(x))


torch.manual_seed(0)
model = HomeMadeVLM(len(processor.tokenizer), image_token).eval()
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")

# %% [markdown]
# Of a transformers model the config says which tokens are vision tokens. This one has none, so each batch says it
# itself, in a `vision_mask`. Everything else in a batch goes to the model's `forward` as it is.

# %%
for batch in calib_data:
    batch["vision_mask"] = batch["input_ids"] == image_token

# %% [markdown]
# ## Quantize
#
# `filter_fn` chooses which linears: the last layer's `shrink` shall stay as it is, say because a measurement showed
# that it is delicate. It gets each linear of the decoder layers with its name. The recipe is MBQ's own, as its scales
# show what the library finds out about a model; the default recipe would be used in the same way.

# %%
original = copy.deepcopy(model)
config = mbq_config(calib_data, recipe="mbq", group_size=32, filter_fn=lambda module, name: name != "layers.3.shrink")
report = quantize_(model, config, progress=False)
table = str(report).splitlines()
print("\n".join(table[: 2 + len(report.groups)]))
print("\nnot quantized:", report.not_quantized)
print(f"folding alone changed the logits by {report.logits_error:.0e}")

# %% [markdown]
# How to read it, and what to be suspicious of:
#
# * The decoder layers were found as the model's only `nn.ModuleList`; with several of them, pass `blocks=[...]`.
# * Which linears share a scale, and which norm or linear can take 1/s, was found by trying: a candidate is accepted
#   only if folding leaves the layer's output as it was. The fused `qkv` belongs to its norm, and `mix` to the last
#   third of the rows of `qkv`, the values.
# * A norm is one that has a vector called `weight` (and perhaps a `bias`), as everywhere in PyTorch. Had its author
#   called it `gain`, nothing would be folded into it, and 1/s would be kept as in the next point.
# * Between `grow` and `shrink` is a GELU, and nothing can be folded through it. There 1/s stays beside the weight as
#   `act_pre_scale`: one multiplication more for each token, and the same accuracy.
# * `folding alone changed the logits by` is the end-to-end check of all that. It must be rounding noise, about 1e-6 in
#   float32.
# * A gain near zero everywhere would say that the data does not excite the model, or that its weights are random as
#   here.
# * `not_quantized` should hold what you left out and nothing else.
#
# `report.records()` has all of it as dicts, `report.to_json("report.json")` as a file. Random weights or not, the
# picture shows at which layer which modality matters:

# %%
report.plot()

# %% [markdown]
# ## Interrupted, and again
#
# A large model takes hours. With `work_dir` every finished layer is remembered, and the same call goes on where the
# last one ended, by Ctrl-C, a crash or a power cut. To see it, a hook presses Ctrl-C as soon as the third layer is to
# be searched.

# %%
finished = list[Path]()


def press_ctrl_c(module: nn.Module, args: tuple) -> None:
    finished[:] = sorted((folder / "work").glob("block_*"))
    if len(finished) == 2:
        raise KeyboardInterrupt


again = copy.deepcopy(original)
hook = again.layers[2].register_forward_pre_hook(press_ctrl_c)
try:
    quantize_(again, config, progress=False, work_dir=folder / "work")
except KeyboardInterrupt:
    print("interrupted; layers in the work_dir:", len(finished))
hook.remove()

unchanged = all(torch.equal(a, b) for a, b in zip(again.parameters(), original.parameters(), strict=True))
print("the model is what it was:", unchanged)

resumed = quantize_(again, config, progress=False, work_dir=folder / "work")
print("layers that were not searched again:", resumed.num_resumed)
batch = {name: calib_data[0][name] for name in ("input_ids", "pixel_values")}
with torch.no_grad():
    print("the same model, bit for bit:", torch.equal(again(**batch), model(**batch)))

# %% [markdown]
# The folder knows what it was made for. Other data, another config or another model is refused, by name:

# %%
try:
    quantize_(
        copy.deepcopy(original),
        mbq_config(calib_data[:3], recipe="mbq", group_size=32),
        progress=False,
        work_dir=folder / "work",
    )
except ValueError as error:
    print(str(error).replace(str(folder), "FOLDER"))

# %% [markdown]
# ## Save and load
#
# A transformers model has `model.save_pretrained(folder)` and `mbq_ao.from_pretrained(folder)`. For any other there is
# one file of plain safetensors, with checksums, in which nothing is pickled:

# %%
save_safetensors(model, folder / "model.safetensors")
fresh = HomeMadeVLM(len(processor.tokenizer), image_token).eval()
fresh.load_state_dict(load_safetensors(folder / "model.safetensors"), assign=True)
print(fresh.layers[0].shrink.weight)
with torch.no_grad():
    print("the same logits, bit for bit:", torch.equal(fresh(**batch), model(**batch)))

# %% [markdown]
# Next: [7. write your own tensor subclass and kernel](07_write_your_own_tensor_subclass_and_kernel.ipynb).
