"""Make packers.safetensors: weights packed, and dequantized, by the GPTQ and AWQ libraries themselves.

    python test/goldens/make_packers.py SOURCES

SOURCES: a folder with the unpacked packages gptqmodel (7.7.0), auto_gptq (0.7.1) and awq (autoawq 0.2.9) side by side,
as `pip download --no-deps` brings them. What gptqmodel imports (pypcre, tokenicer, device-smi, logbar, defuser) must be
installed; of the others only the file with the packer is run, since the rest needs transformers of their time.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

N, K = 32, 128
COLUMNS = torch.arange(K)
packed: dict[str, Tensor] = {}


def random_weight(
    bits: int, group_of: Tensor, sym: bool, seed: int, lowest: int = 0
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear whose weight lies on the grid, scale (N, groups) and zero point (N, groups)."""
    generator = torch.Generator().manual_seed(seed)
    groups = int(group_of.max()) + 1
    codes = torch.randint(0, 2**bits, (N, K), generator=generator)
    zero = torch.full((N, groups), 2 ** (bits - 1))
    if not sym:
        zero = torch.randint(0, 2**bits, (N, groups), generator=generator).clamp(min=lowest)
    scale = (torch.rand(N, groups, generator=generator) * 0.05 + 0.001).half()
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = (codes - zero[:, group_of]) * scale.float()[:, group_of]
    return linear, scale, zero


def keep(name: str, module: nn.Module, parts: tuple[str, ...], weight: Tensor) -> None:
    packed.update({f"{name}.{part}": getattr(module, part).clone().contiguous() for part in parts})
    packed[f"{name}.weight"] = weight.half().contiguous()


def gptqmodel(name: str, bits: int, group_of: Tensor, group_size: int, sym: bool, seed: int, v1: bool) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    linear, scale, zero = random_weight(bits, group_of, sym, seed)
    module = TorchLinear(
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act="desc_act" in name,
        in_features=K,
        out_features=N,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    module.pack_original(linear, scale.float(), zero.float(), group_of.to(torch.int32))
    module.post_init()
    weight = module.dequantize_weight().t()
    if v1:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group_size))
    keep(name, module, ("qweight", "qzeros", "scales", "g_idx"), weight)


def autogptq(name: str, seed: int) -> None:
    without_inits("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
    sys.modules["auto_gptq.nn_modules.qlinear"].GeneralQuantLinear = nn.Module  # type: ignore[attr-defined]
    packer = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    group_of = COLUMNS // 64
    linear, scale, zero = random_weight(3, group_of, False, seed, lowest=1)
    linear.half()
    module = packer.QuantLinear(3, 64, K, N, False)
    module.pack(linear, scale.float(), zero.float(), group_of.to(torch.int32))
    weight = module.forward(torch.eye(K, dtype=torch.float16)).t()
    keep(name, module, ("qweight", "qzeros", "scales", "g_idx"), weight)


def autoawq(name: str, group_size: int, sym: bool, seed: int) -> None:
    without_inits("awq", "awq.modules", "awq.modules.linear")
    gemm = importlib.import_module("awq.modules.linear.gemm")
    gemm.get_best_device = lambda: "cpu"
    linear, scale, zero = random_weight(4, COLUMNS // group_size, sym, seed)
    scales, zeros = scale.t().contiguous().float(), zero.t().contiguous()
    module = gemm.WQLinear_GEMM.from_linear(linear, 4, group_size, scales=scales, zeros=zeros)
    weight = gemm.dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group_size).t()
    keep(name, module, ("qweight", "qzeros", "scales"), weight)


def without_inits(*packages: str) -> None:
    """Make packages importable without running their __init__.py."""
    for package in packages:
        module = types.ModuleType(package)
        module.__path__ = [str(SOURCES / package.replace(".", "/"))]
        sys.modules[package] = module


if __name__ == "__main__":
    SOURCES = Path(sys.argv[1])
    sys.path.insert(0, str(SOURCES))
    scattered = (COLUMNS // 32)[torch.randperm(K, generator=torch.Generator().manual_seed(3))]
    gptqmodel("gptqmodel_3bit_v2", 3, COLUMNS // 32, 32, False, 0, v1=False)
    gptqmodel("gptqmodel_3bit_v1", 3, COLUMNS // 64, 64, False, 1, v1=True)
    gptqmodel("gptqmodel_3bit_sym_row_v1", 3, COLUMNS * 0, -1, True, 2, v1=True)
    gptqmodel("gptqmodel_3bit_desc_act_v2", 3, scattered, 32, False, 3, v1=False)
    gptqmodel("gptqmodel_4bit_v1", 4, COLUMNS // 32, 32, False, 8, v1=True)
    gptqmodel("gptqmodel_4bit_sym_v1", 4, COLUMNS // 64, 64, True, 4, v1=True)
    autogptq("autogptq_3bit", 5)
    autoawq("autoawq_4bit", 32, False, 6)
    autoawq("autoawq_4bit_sym", 64, True, 7)
    save_file(packed, Path(__file__).with_name("packers.safetensors"))
