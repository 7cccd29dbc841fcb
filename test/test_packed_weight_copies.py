"""Packed weights converted, moved, copied, saved and loaded."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packed_weights import (
    DTYPES,
    G,
    K,
    Kind,
    N,
    assert_same,
    assert_same_data,
    each_kind,
    linear,
    quantized,
    random_weight,
    random_x,
)
from torch import nn


@each_kind
class TestConversions:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_to_dtype_converts_scales(self, dtype: torch.dtype, kind: Kind) -> None:
        w = quantized(kind, pre_scale=True)
        for out in (w.to(dtype), linear(w).to(dtype).weight):
            assert isinstance(out, kind)
            assert out.dtype == out.scale.dtype == out.act_pre_scale.dtype == dtype
            assert_same(out.scale, w.scale.to(dtype))
            for name in set(kind.tensor_data_names) - {"scale"}:
                assert_same(getattr(out, name), getattr(w, name))

    def test_module_in_bf16_computes_in_bf16(self, kind: Kind) -> None:
        layer = linear(quantized(kind, pre_scale=True))
        x = random_x(3, K)
        expected = layer(x)
        y = layer.to(torch.bfloat16)(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.5)

    def test_to_device(self, kind: Kind) -> None:
        w = quantized(kind, pre_scale=True)
        meta = w.to("meta")
        assert meta.device.type == meta.qdata.device.type == meta.act_pre_scale.device.type == "meta"
        assert w.to("cpu") is w
        assert F.linear(torch.empty(2, K, device="meta"), meta).shape == (2, N)

    def test_copies(self, kind: Kind) -> None:
        w = quantized(kind, pre_scale=True)
        assert_same_data(w.detach(), w)
        assert w.detach().qdata.data_ptr() == w.qdata.data_ptr()
        assert_same_data(torch.ops.aten.alias.default(w), w)
        for other in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.to(w.dtype, copy=True)):
            assert_same_data(other, w)
            assert other.qdata.data_ptr() != w.qdata.data_ptr()
        assert_same_data(w.contiguous(), w)
        sliced = w[:, 128:256]
        assert_same_data(sliced.contiguous(), sliced.clone())

    def test_copy_in_both_directions(self, kind: Kind) -> None:
        plain = torch.empty(N, K).copy_(quantized(kind))
        assert_same(plain, quantized(kind).dequantize())
        w = quantized(kind, pre_scale=True)
        target = torch.empty_like(w)
        assert target.copy_(w) is target
        assert_same_data(target, w)

    def test_likes(self, kind: Kind) -> None:
        w = quantized(kind, pre_scale=True)
        assert torch.empty_like(w).quantized_nbytes() == w.quantized_nbytes()
        assert_same(torch.zeros_like(w).dequantize(), torch.zeros(N, K))
        assert torch.empty_like(w, dtype=torch.bfloat16).scale.dtype == torch.bfloat16
        assert torch.empty_like(w, device="meta").qdata.device.type == "meta"
        assert isinstance(linear(w).to_empty(device="cpu").weight, kind)

    def test_parameter_is_the_tensor(self, kind: Kind) -> None:
        layer = linear(quantized(kind))
        assert isinstance(layer.weight, kind)
        assert isinstance(layer.weight, nn.Parameter)
        assert not layer.weight.requires_grad

    def test_shards_are_copied_into_a_whole(self, kind: Kind) -> None:
        w = quantized(kind)
        whole = torch.empty_like(w)
        for start in (0, 32, 64):
            whole.narrow(0, start, 32).copy_(w.narrow(0, start, 32))
        assert_same_data(whole, w)
        for start in (0, 128, 256):
            whole.narrow(1, start, 128).copy_(quantized(kind).narrow(1, start, 128))
        assert_same_data(whole, w)

    def test_a_parameter_that_asks_for_gradients_gets_none(self, kind: Kind) -> None:
        layer = linear(quantized(kind))
        layer.weight.requires_grad_()
        layer(random_x(2, K)).sum().backward()
        assert layer.weight.grad is None
        assert layer.bias.grad is not None


@each_kind
class TestStateDict:
    def test_save_and_load_with_weights_only(self, kind: Kind) -> None:
        layer = linear(quantized(kind, pre_scale=True))
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        for assign in (False, True):
            file.seek(0)
            state = torch.load(file, weights_only=True)
            target = linear(kind.from_hp(random_weight() + 1, G, act_pre_scale=torch.ones(K)))
            target.load_state_dict(state, assign=assign)
            assert_same_data(target.weight.data, layer.weight.data)

    def test_memory_mapped(self, kind: Kind, tmp_path: Path) -> None:
        layer = linear(quantized(kind, pre_scale=True))
        torch.save(layer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
        target = linear(torch.empty_like(layer.weight))
        target.load_state_dict(state, assign=True)
        assert_same_data(target.weight.data, layer.weight.data)

    def test_into_a_meta_model(self, kind: Kind) -> None:
        layer = linear(quantized(kind))
        with torch.device("meta"):
            target = nn.Linear(K, N)
        target.load_state_dict(layer.state_dict(), assign=True)
        assert_same(target(random_x(2, K)), layer(random_x(2, K)))

    def test_into_a_plain_model_dequantizes(self, kind: Kind) -> None:
        layer, target = linear(quantized(kind)), nn.Linear(K, N)
        target.load_state_dict(layer.state_dict())
        assert_same(target.weight.data, layer.weight.dequantize())

    def test_into_a_plain_model_only_without_act_pre_scale(self, kind: Kind) -> None:
        layer, target = linear(quantized(kind, pre_scale=True)), nn.Linear(K, N)
        with pytest.raises(RuntimeError, match="which has no act_pre_scale; load a state dict with assign=True"):
            target.load_state_dict(layer.state_dict())
        target.load_state_dict(layer.state_dict(), assign=True)
        assert_same(target(random_x(2, K)), layer(random_x(2, K)))
