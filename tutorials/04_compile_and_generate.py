# %% [markdown]
# # 4. Compile and generate
#
# A model generates one token at a time, and for each it runs some two thousand small operations. Started one by one
# from Python, each takes a while before it does anything, whatever it does. `torch.compile` puts one decoding step into
# one graph. This page shows that a quantized model compiles as a whole, into a single graph that serves prompts of all
# lengths, and that the tokens are those of the uncompiled model.
#
# What you need is in [tutorial 2](02_quantize_a_vlm.ipynb).

# %%
import os

os.environ["MBQ_AO_CPU_COMPILE"] = "0"  # a few short answers are quicker without compiling the CPU kernel first

from collections import Counter

from torch import nn
from torch._dynamo.utils import counters

from mbq_ao import Int3WeightOnlyConfig, compile_for_generation, quantize_
from mbq_ao.demo.data import group_by_image, load_easy_vqa
from mbq_ao.demo.evaluate import answer
from mbq_ao.demo.model import build_demo_vlm

model, processor = build_demo_vlm()

# %% [markdown]
# Plain rounding is enough here: how the weights were found makes no difference to what runs. The filter takes the
# linears of the language model's 30 layers.

# %%
quantize_(
    model,
    Int3WeightOnlyConfig(group_size=64),
    lambda module, name: isinstance(module, nn.Linear) and "language_model.layers." in name,
)
rows = [group[0] for group in group_by_image(load_easy_vqa("test"))[:2]]
eager = [answer(model, processor, row.image, row.question) for row in rows]
for row, text in zip(rows, eager, strict=True):
    length = processor(text="<image>" + row.question, images=[row.image])["input_ids"][0]
    print(f"{len(length)} tokens of image and question: {row.question} {text}")

# %% [markdown]
# ## What stands in the way of one graph
#
# A graph is made for fixed shapes, and by default the key-value cache of `generate` grows by one with each token: every
# step has new shapes. A *static* cache is allocated once, at its full length, and a step writes into its place in it.
# This is all that `compile_for_generation` asks transformers for: a static cache, and that the decoding step be
# compiled in one graph. The prompt is not compiled, since its length differs from call to call.
#
# To see what the compiler gets, this page registers a backend that counts the operations of a graph and runs it as it
# is. On your machine leave `backend` out: then it is `inductor`, which generates code, and on a GPU replays the step as
# one CUDA graph.

# %%
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd

graphs = []


@register_backend
def counting(graph_module, inputs):
    def count(graph_module, inputs):
        graphs.append(Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"))
        return graph_module.forward

    return aot_autograd(fw_compiler=count)(graph_module, inputs)


counters.clear()
compile_for_generation(model, max_cache_len=128, backend="counting")
compiled = [answer(model, processor, row.image, row.question) for row in rows]
assert compiled == eager

print("answers:", compiled)
print("graphs:", counters["stats"]["unique_graphs"], "for prompts of two lengths and all of their tokens")
print("graph breaks:", sum(counters["graph_break"].values()))

# %% [markdown]
# `max_cache_len` is the room for prompt and answer together. Without it the cache is as long as the longest call so far
# needed, and a longer one compiles again.
#
# ## What is in the graph

# %%
print("operations in the graph:", sum(graphs[0].values()))
for name, number in graphs[0].most_common(8):
    print(f"{number:6d}  {name}")

# %% [markdown]
# Each of the 7 x 30 quantized linears is exactly one node, `mbq_ao.int3_linear`: nothing is unpacked outside of the
# kernels, and no full weight is ever in memory. Beside them there are few matrix products, those of attention and,
# last, the output head, which stays in full precision. Everything in between are small operations on one token, the
# norms, rotary embeddings, activations and additions, that inductor fuses.
#
# ## On a GPU
#
# ```python
# model.to("cuda")
# compile_for_generation(model, max_cache_len=4096)  # once; the first generate compiles
# model.generate(**inputs, max_new_tokens=100)       # as always
# ```
#
# Two more things may help, and are off until asked for. They have not been measured on a GPU yet, and this page, run on
# a CPU, says nothing about speed:
#
# * `mbq_ao.fuse_linears_(model)` lays q, k, v and gate, up together, and with `torch.compile(model.forward,
#   options=mbq_ao.compile_options("reduce-overhead"))` each such group is one launch;
# * `mbq_ao.tune(model)` measures which kernel configuration is fastest for these layers on this GPU.
#
# Next: [5. how good is it?](05_evaluate_with_lm_eval.ipynb)
