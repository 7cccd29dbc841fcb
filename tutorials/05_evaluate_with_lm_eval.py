# %% [markdown]
# # 5. Evaluate with lm-eval
#
# How much did the model lose? A handful of answers cannot tell. This page asks three versions of one model the same
# questions through [lm-eval](https://github.com/EleutherAI/lm-evaluation-harness), puts the scores side by side with
# their errors, looks at the questions that broke, and ends with a measure that sees more with fewer questions.
#
# What you need is in [tutorial 2](02_quantize_a_vlm.ipynb), and `pip install "mbq_ao[eval]"`. Nothing here uses the
# network: the questions come with this package.

# %%
import copy
import io
import os
import tempfile
from contextlib import redirect_stderr

os.environ["MBQ_AO_CPU_COMPILE"] = "0"  # so few questions are answered sooner without compiling the CPU kernel first

import matplotlib.pyplot as plt
from PIL import Image
from rich.console import Console
from torch import nn

from mbq_ao import Int3WeightOnlyConfig, evaluate, quantize_
from mbq_ao.demo.data import calibration_batches, load_easy_vqa
from mbq_ao.demo.model import build_demo_vlm
from mbq_ao.evaluation import bad_cases, compare, divergence

plt.rcParams["figure.dpi"] = 72

# %% [markdown]
# ## Three models
#
# Full precision; 3 bits with a scale for every 64 weights; and 3 bits with a scale for every 128, which is coarser and
# saves a fifth of a bit a weight (of scales in 16 bits). Plain rounding, so that this page is about measuring and not
# about calibration.

# %%
original, processor = build_demo_vlm()


def rounded(group_size: int) -> nn.Module:
    model = copy.deepcopy(original)
    quantize_(
        model,
        Int3WeightOnlyConfig(group_size=group_size),
        lambda module, name: isinstance(module, nn.Linear) and "language_model.layers." in name,
    )
    return model


models = {"full precision": original, "3 bits / 64": rounded(64), "3 bits / 128": rounded(128)}

# %% [markdown]
# ## One call a model
#
# `mbq_ao.evaluate` takes a model in memory, or a checkpoint by path or hub name, and any of lm-eval's tasks, of text or
# of images. `easy_vqa` is a task of ours: questions about pictures of one coloured shape, of which 16 are asked here.
# `log_samples` keeps every answer, which the comparison needs.

# %%
results = {}
with redirect_stderr(io.StringIO()):  # lm-eval's progress bars
    for name, model in models.items():
        results[name] = evaluate(
            model,
            ["easy_vqa"],
            processor=processor,
            name=name,
            limit=16,
            batch_size=16,
            log_samples=True,
        )
scores = results["full precision"]["results"]["easy_vqa"]
print({key: round(float(value), 3) for key, value in scores.items() if key.startswith("exact_match")})

# %% [markdown]
# What comes back is lm-eval's own dictionary, in the form in which its leaderboards and scripts expect it;
# `output="folder"` writes its files. Side by side:

# %%
comparison = compare(*results.values())
Console(width=120, force_jupyter=False, force_terminal=False).print(comparison.table())

# %% [markdown]
# Read such a table with its errors. The standard error of an accuracy of 95% on 16 questions is 5 points: a model that
# is one question better or worse has not been shown to be either. And an error of 0, as full precision has it here,
# says only that 16 questions were too few to see it fail. The columns called difference do better, as all models were
# asked *the same* questions: what is easy or hard about them cancels, and the error is that of the questions on which
# two models disagree. The smallest true statement of this table is that groups of 128 seem to cost this model
# something. Sizes are of the whole float32 model; in 3 bits are only the language model's layers.
#
# ## What broke
#
# A number says that something was lost, an example says what. `bad_cases` lists the questions that were answered right
# before and wrong after, and writes a page with their images:

# %%
with tempfile.TemporaryDirectory() as folder:
    found = bad_cases(results["full precision"], results["3 bits / 128"], folder)
    print(found["tasks"]["easy_vqa"])
    shown = found["cases"][:4]
    figure, axes = plt.subplots(1, max(len(shown), 1), figsize=(2.8 * max(len(shown), 1), 2.8), squeeze=False)
    for panel, case in zip(axes[0], shown, strict=False):
        panel.imshow(Image.open(os.path.join(folder, case["images"][0])))
        question = case["prompt"].partition("<image>")[2].partition("<|im_end|>")[0]
        panel.set_title(f"{question}\nbefore: {case['before']}, after: {case['after']}", fontsize=9)
        panel.axis("off")
    figure.tight_layout()
    plt.show()

# %% [markdown]
# ## With fewer questions
#
# An answer is right or wrong, one bit a question. The model computes much more: a probability for each token it could
# have said. The Kullback-Leibler divergence measures how far the quantized model's probabilities are from the
# original's, in nats a token; 0 is the same. It needs no right answers, and a few samples tell models apart that
# accuracy cannot.

# %%
samples = calibration_batches(processor, load_easy_vqa("train"), num_samples=4, seed=1)
for name, model in list(models.items())[1:]:
    print(f"{name}: {divergence(model, original, samples)}")

# %% [markdown]
# It is a measure of difference, not of quality: use it to choose between two ways to quantize one model, and tasks to
# find out what the result can do.
#
# ## From the command line
#
# ```
# mbq-ao eval path/to/original path/to/quantized --tasks easy_vqa,text_perplexity --limit 200 --output results
# ```
#
# evaluates both, prints the table, and writes the JSON files, the table and the bad cases. Tasks of lm-eval that need
# their data from the network go by the same names as there: `--tasks mmmu_val,hellaswag`.
#
# Next: [6. your own model and data](06_your_own_model_and_data.ipynb).
