"""Unpacking against the real packers' own output (test/goldens/packers.safetensors), and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gptq_parts, pack_columns, random_weight
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor, PerGroup, quantize_
from torchao.quantization.quant_api import IntxWeightOnlyConfig, MappingType

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor
from mbq_ao.interchange.affine import AffineWeight, InexactError
from mbq_ao.interchange.awq import AWQFormat
from mbq_ao.interchange.bits import pack_bits, unpack_bits
from mbq_ao.interchange.gptq import GPTQFormat
from mbq_ao.interchange.torchao import from_stock, to_stock

PACKERS = load_file(Path(__file__).parents[1] / "goldens" / "packers.safetensors")
# Name: the format that reads it, and the precisions in which it has an exact form.
V1, V2 = {"checkpoint_format": "gptq"}, {"format": "gptq_v2"}
GOLDENS: dict[str, tuple[Any, set[str]]] = {
    "gptqmodel_3bit_v1": (GPTQFormat({"bits": 3, "group_size": 64, **V1}), {"w3a16", "w4a8", "torchao"}),
    "gptqmodel_3bit_v2": (GPTQFormat({"bits": 3, "group_size": 32, **V2}), {"w3a16", "w4a8", "torchao"}),
    "gptqmodel_3bit_sym_row_v1": (GPTQFormat({"bits": 3, "group_size": -1}), {"w3a16", "w4a8", "torchao"}),
    "gptqmodel_3bit_desc_act_v2": (GPTQFormat({"bits": 3, "group_size": 32, **V2}), set()),
    "autogptq_3bit": (GPTQFormat({"bits": 3, "group_size": 64}), {"w3a16", "w4a8", "torchao"}),
    "gptqmodel_4bit_v1": (GPTQFormat({"bits": 4, "group_size": 32, **V1}), {"torchao"}),
    "gptqmodel_4bit_sym_v1": (GPTQFormat({"bits": 4, "group_size": 64}), {"w4a8", "torchao"}),
    "autoawq_4bit": (AWQFormat({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}), {"torchao"}),
    "autoawq_4bit_sym": (AWQFormat({"bits": 4, "group_size": 64, "version": "gemm"}), {"w4a8", "torchao"}),
}


def parts_of(name: str) -> dict[str, Tensor]:
    return {key.split(".")[1]: value for key, value in PACKERS.items() if key.startswith(f"{name}.")}


def test_every_golden_is_used() -> None:
    assert {key.split(".")[0] for key in PACKERS} == GOLDENS.keys()


@pytest.mark.parametrize("name", GOLDENS)
def test_real_packers(name: str) -> None:
    """The weight is bit for bit what the library that packed it dequantizes, plain and in every exact form."""
    reader, exact = GOLDENS[name]
    parts = parts_of(name)
    expected = parts.pop("weight")
    weight = reader.unpack(name, parts, *expected.shape)
    assert torch.equal(weight.convert("plain", torch.float16), expected)
    for precision in ("w3a16", "w4a8", "torchao"):
        if precision in exact:
            assert torch.equal(weight.convert(precision, torch.float16).dequantize(), expected), precision
        else:
            with pytest.raises(InexactError, match=name):
                weight.convert(precision, torch.float16)
    if "w3a16" in exact:
        assert torch.equal(weight.as_int3().dequantize().float(), expected.float())
        assert weight.as_int3().scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [3, 4])
def test_bits(bits: int) -> None:
    fields = torch.randint(0, 2**bits, (96, 5), dtype=torch.uint8)
    words = pack_bits(fields, bits)
    assert torch.equal(words, pack_columns(fields.t().contiguous(), bits).t())
    assert torch.equal(unpack_bits(words, bits), fields)


def affine(group_of: Tensor, bits: int = 3, n: int = 32, sym: bool = False) -> AffineWeight:
    codes, zero, scale = random_weight(n, len(group_of), bits, group_of, sym, 0)
    return AffineWeight("w", bits, codes.to(torch.uint8), scale, zero.to(torch.uint8), group_of)


@pytest.mark.parametrize(
    ("k", "size", "ours"),
    [(256, 256, 256), (512, 256, 128), (384, 192, 64), (160, 128, 128), (96, 96, 96), (64, 32, 32)],
)
def test_groups_of_any_multiple_of_32(k: int, size: int, ours: int) -> None:
    """Of a size that we do not have, too: several of ours that repeat the scale. The last group may be short."""
    weight = affine(torch.arange(k) // size)
    packed = weight.as_int3()
    assert packed.group_size == ours
    assert torch.equal(packed.dequantize(), weight.dequantize(torch.float16))


def test_static_groups() -> None:
    """desc_act with static_groups: groups lie together, numbered in another order."""
    weight = affine(torch.tensor([2, 0, 3, 1]).repeat_interleave(32))
    assert torch.equal(weight.as_int3().dequantize(), weight.dequantize(torch.float16))


@pytest.mark.parametrize("group_of", [torch.arange(64) % 2, torch.arange(64) // 16])
def test_scattered_or_small_groups(group_of: Tensor) -> None:
    weight = affine(group_of)
    with pytest.raises(InexactError, match="w are grouped in another order"):
        weight.as_int3()
    anew = weight.convert("w3a16", torch.float16, requantize=True)
    assert torch.equal(anew.dequantize(), MBQInt3Tensor.from_hp(weight.dequantize(torch.float16), 32).dequantize())


def test_requantize_keeps_what_is_exact() -> None:
    exact, asymmetric = affine(torch.arange(128) // 64, 4, sym=True), affine(torch.arange(128) // 64, 4)
    assert torch.equal(
        exact.convert("w4a8", torch.float16, requantize=True).dequantize(), exact.dequantize(torch.float16)
    )
    anew = asymmetric.convert("w4a8", torch.float16, requantize=True)
    assert torch.equal(anew.qdata, MBQW4A8Tensor.from_hp(asymmetric.dequantize(torch.float16), 64).qdata)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 2}, "2 bits"),
        ({"bits": 8}, "8 bits"),
        ({}, "None bits"),
        ({"bits": 3, "checkpoint_format": "marlin"}, "'marlin'.*gptq_v2"),
        ({"bits": 4, "is_marlin_format": True}, "'marlin'"),
        ({"bits": 3, "format": "gptq_p"}, "'gptq_p'"),
        ({"bits": 3, "group_size": 0}, "group_size must be .* got 0"),
        ({"bits": 3, "group_size": "128"}, "group_size must be"),
        ({"bits": 3, "pack_dtype": "int16"}, "pack_dtype must be int32"),
    ],
)
def test_gptq_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GPTQFormat(settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 3}, "3 bits"),
        ({"w_bit": 8}, "8 bits"),
        ({"bits": 4, "version": "gemv"}, "'gemv'.*gemm"),
        ({"bits": 4, "version": "marlin"}, "'marlin'"),
        ({"bits": 4, "version": "gemm", "backend": "llm-awq"}, "'llm-awq'"),
        ({"bits": 4, "zero_point": False}, "zero_point must be true"),
    ],
)
def test_awq_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AWQFormat(settings)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("qzeros", None, "of w it has .* but no qzeros"),
        ("scales", None, "no scales"),
        ("qweight", torch.zeros(11, 32, dtype=torch.int32), r"qweight of w must be int32 \(12, 32\).*\(11, 32\)"),
        ("qweight", torch.zeros(12, 32), "qweight of w must be int32"),
        ("qzeros", torch.zeros(3, 3, dtype=torch.int32), r"qzeros of w must be int32 \(4, 3\)"),
        ("scales", torch.zeros(4, 31).half(), r"scales of w must be float \(4, 32\)"),
        ("scales", torch.full((4, 32), torch.nan).half(), "scales of w holds NaN"),
        ("g_idx", torch.zeros(3, dtype=torch.int32), r"g_idx of w must be int32 \(128,\)"),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), "4 groups, but columns of the groups 4 to 4"),
        ("g_idx", torch.full((128,), -1, dtype=torch.int32), "groups -1 to -1"),
    ],
)
def test_gptq_parts(part: str, value: Tensor | None, says: str) -> None:
    group_of = torch.arange(128) // 32
    parts = gptq_parts(*random_weight(32, 128, 3, group_of, False, 0), group_of, 3, True)
    if value is None:
        del parts[part]
    else:
        parts[part] = value
    with pytest.raises(ValueError, match=says):
        GPTQFormat({"bits": 3, "group_size": 32}).unpack("w", parts, 32, 128)


def test_gptq_without_g_idx_and_with_layers_of_other_bits() -> None:
    group_of = torch.arange(128) // 64
    codes, zero, scale = random_weight(32, 128, 4, group_of, False, 0)
    parts = gptq_parts(codes, zero, scale, group_of, 4, True)
    del parts["g_idx"]
    weight = GPTQFormat({"bits": 3, "group_size": 64, "dynamic": {"+:.*": {"bits": 4}}}).unpack("w", parts, 32, 128)
    assert weight.bits == 4 and torch.equal(weight.codes, codes.to(torch.uint8))
    assert torch.equal(weight.group_of, group_of)
    with pytest.raises(ValueError, match="qweight of w must be"):
        GPTQFormat({"bits": 3, "group_size": 64}).unpack("w", parts, 32, 128)
    with pytest.raises(ValueError, match="scales for 2 groups, but columns of the groups 0 to 3"):
        GPTQFormat({"bits": 4, "group_size": 32}).unpack("w", parts, 32, 128)


def test_sizes_that_fill_no_words() -> None:
    parts = {"qweight": torch.zeros(3, 40), "qzeros": torch.zeros(1, 3), "scales": torch.zeros(1, 40)}
    with pytest.raises(ValueError, match="out_features = 40"):
        GPTQFormat({"bits": 3}).unpack("w", parts, 40, 32)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_awq_parts(part: str) -> None:
    parts = parts_of("autoawq_4bit")
    with pytest.raises(ValueError, match=f"{part} of w must be"):
        AWQFormat({"group_size": 32}).unpack("w", parts | {part: parts[part][:-1]}, 32, 128)
    del parts[part]
    with pytest.raises(ValueError, match=f"no {part}"):
        AWQFormat({"group_size": 32}).unpack("w", parts, 32, 128)


# --- torchao's tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", [MappingType.ASYMMETRIC, MappingType.SYMMETRIC])
@pytest.mark.parametrize("bits", [3, 4])
def test_intx(bits: int, mapping: MappingType) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(128, 32).half())
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(64), mapping)
    quantize_(linear, config)
    weight = linear[0].weight
    assert isinstance(weight, IntxUnpackedToInt8Tensor)
    precision = "w3a16" if bits == 3 else "w4a8"
    if bits == 4 and mapping is MappingType.ASYMMETRIC:
        with pytest.raises(InexactError, match="not symmetric"):
            from_stock("w", weight).convert(precision, torch.float16)
        return
    ours = from_stock("w", weight).convert(precision, torch.float16)
    assert torch.equal(ours.dequantize(), weight.dequantize())


def test_int4tensor() -> None:
    """Two codes a byte, the even column in the low half; without mslk it cannot be made by torchao here."""
    q = torch.randint(-8, 8, (32, 128), dtype=torch.int8)
    scale = torch.rand(2, 32).bfloat16()
    packed = (q[:, ::2] & 0xF) | (q[:, 1::2] << 4)
    weight = Int4Tensor(packed, scale, torch.zeros_like(scale), [1, 64], q.shape)
    expected = q * scale.t().repeat_interleave(64, 1)
    assert torch.equal(from_stock("w", weight).convert("w4a8", torch.bfloat16).dequantize(), expected)
    weight.zero_point[0, 0] = 0.1
    with pytest.raises(InexactError, match="w is a Int4Tensor with zero points"):
        from_stock("w", weight)


@pytest.mark.parametrize("with_pre_scale", [False, True])
def test_ours_as_torchaos_and_back(with_pre_scale: bool) -> None:
    w, x = torch.randn(48, 128).half(), torch.randn(3, 128).half()
    pre = torch.rand(128).half() + 0.5 if with_pre_scale else None
    int3 = MBQInt3Tensor.from_hp(w, 64, pre)
    stock = to_stock("w", int3)
    assert torch.equal(stock.dequantize(), int3.dequantize())
    torch.testing.assert_close(
        torch.nn.functional.linear(x, stock), torch.nn.functional.linear(x, int3), atol=5e-2, rtol=1e-2
    )
    w4a8 = MBQW4A8Tensor.from_hp(w, None, pre)
    stock = to_stock("w", w4a8)
    assert torch.equal(stock.dequantize(), w4a8.dequantize())
    back = from_stock("w", stock).as_w4a8()
    assert torch.equal(back.qdata, w4a8.qdata) and torch.equal(back.scale.half(), w4a8.scale)
    if pre is not None:
        assert torch.equal(stock.act_pre_scale, pre) and torch.equal(back.act_pre_scale, pre)
        with pytest.raises(InexactError, match="act_pre_scale"):
            from_stock("w", stock).as_plain(torch.float16)


def test_what_torchao_cannot_hold() -> None:
    w = torch.randn(2, 32, 96).half()
    with pytest.raises(InexactError, match="w has 3 scales a row"):
        to_stock("w", MBQW4A8Tensor.from_hp(w[0], 32))
    with pytest.raises(InexactError, match="whole groups of 64"):
        to_stock("w", MBQInt3Tensor.from_hp(w[0], 64))
    with pytest.raises(InexactError, match="experts"):
        to_stock("w", MBQInt3Tensor.from_hp(w, 32))
