"""mbq_ao: modality-balanced quantization (W3A16, W4A8) of vision-language models, torchao style.

    from mbq_ao import calibration_data, mbq_config, quantize_
    calib_data = calibration_data("conversations.json", processor)
    report = quantize_(model, mbq_config(calib_data))

The tree, and which way imports go (each line imports only from lines above it):

    kernels/               shapes and bits: packed layout, fp32 reference, Triton kernels, the custom op
    quant_primitives.py    choose_qparams, quantize, dequantize: pure torch
    packed_weight.py       what our weights have in common; packed_shapes.py: their slices, splits and views;
                           packed_shards.py: parts that no view can serve, and collectives;
                           packed_products.py: linears, matmuls and products of experts
    int3_tensor.py         MBQInt3Tensor, the weight that serves W3A16; w4a8_tensor.py: MBQW4A8Tensor
    fuse_linears.py        linears that read one input: one launch for them
    tuning.py              measure which kernel configuration is fastest here
    config.py              torchao configs: how a linear gets such a weight by plain rounding
    vision_tower.py        the vision tower's linears, by plain rounding
    calibration/           MBQ itself; never imported at serve time. Start reading at calibration/mbq.py
    quantize.py            mbq_config and quantize_, the front door
    safetensors_format.py  quantized weights in safetensors files: the checkpoint format
    generation.py          compiled `model.generate`
    export.py              the decoder as a program for torch.export and AOTInductor
    tensor_parallel.py     loading a checkpoint by several ranks
    hf_quantizer.py        quant_method "mbq" of transformers; pretrained.py: save_pretrained, from_pretrained
    interchange/           checkpoints of other libraries (GPTQ, AWQ, torchao), in and out
    evaluation/            lm-eval's tasks and a few offline ones, on quantized models; comparisons
    demo/                  a real small vision-language model
    cli/                   the command line, `mbq-ao` and `python -m mbq_ao`
"""

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import _mbq_ao_autoload


def _is_command_line() -> bool:
    """Whether this process is `mbq-ao` or `python -m mbq_ao`, whose --help is not to wait seconds for torch."""
    start = sys.argv[0] if sys.argv else ""
    if start == "-m":  # Python is looking for the module to run
        return ("-m", "mbq_ao") in pairwise(sys.orig_argv)
    return Path(start).stem == "mbq-ao"


if TYPE_CHECKING or not _is_command_line():
    from mbq_ao._quiet import import_torchao

    import_torchao()

    from mbq_ao.config import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig
    from mbq_ao.int3_tensor import MBQInt3Tensor
    from mbq_ao.quantize import MBQConfig, mbq_config, quantize_
    from mbq_ao.w4a8_tensor import MBQW4A8Tensor

__version__ = "0.1.0.dev0"

__all__ = [
    "CalibrationReport",
    "Int3WeightOnlyConfig",
    "Int8DynamicActivationInt4WeightMBQConfig",
    "MBQConfig",
    "MBQInt3Tensor",
    "MBQW4A8Tensor",
    "ScaleGroup",
    "calibration_data",
    "compile_for_generation",
    "compile_options",
    "evaluate",
    "export_decoder",
    "from_pretrained",
    "fuse_linears_",
    "import_checkpoint",
    "load_safetensors",
    "mbq_config",
    "quantize_",
    "register_with_torchao",
    "save_gptq",
    "save_pretrained",
    "save_safetensors",
    "save_torchao",
    "tune",
    "unfuse_linears_",
]


# Loaded when asked for, so that serving a model imports neither the calibration nor torch.compile's machinery. What is
# imported above is here for the command line.
_LAZY = {
    "CalibrationReport": "mbq_ao.calibration.report",
    "Int3WeightOnlyConfig": "mbq_ao.config",
    "Int8DynamicActivationInt4WeightMBQConfig": "mbq_ao.config",
    "MBQConfig": "mbq_ao.quantize",
    "MBQInt3Tensor": "mbq_ao.int3_tensor",
    "MBQW4A8Tensor": "mbq_ao.w4a8_tensor",
    "ScaleGroup": "mbq_ao.calibration.fold",
    "calibration_data": "mbq_ao.calibration.data",
    "compile_for_generation": "mbq_ao.generation",
    "compile_options": "mbq_ao.fuse_linears",
    "evaluate": "mbq_ao.evaluation",
    "export_decoder": "mbq_ao.export",
    "from_pretrained": "mbq_ao.pretrained",
    "fuse_linears_": "mbq_ao.fuse_linears",
    "import_checkpoint": "mbq_ao.interchange.load",
    "load_safetensors": "mbq_ao.safetensors_format",
    "mbq_config": "mbq_ao.quantize",
    "quantize_": "mbq_ao.quantize",
    "register_with_torchao": "mbq_ao.interchange.torchao_checkpoint",
    "save_gptq": "mbq_ao.interchange.gptq_checkpoint",
    "save_pretrained": "mbq_ao.pretrained",
    "save_safetensors": "mbq_ao.safetensors_format",
    "save_torchao": "mbq_ao.interchange.torchao_checkpoint",
    "tune": "mbq_ao.tuning",
    "unfuse_linears_": "mbq_ao.fuse_linears",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_mbq_ao_autoload.install()  # so that transformers can load our checkpoints
