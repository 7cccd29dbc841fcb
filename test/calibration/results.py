"""What a calibration left: everything in the model, and the report."""

from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mbq_ao import CalibrationReport

Result = tuple[dict[str, list[Tensor]], CalibrationReport]


def parts_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Every tensor of the model by name, on the CPU; those of a quantized weight in order."""
    return {name: _parts(tensor) for name, tensor in model.state_dict().items()}


def _parts(tensor: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.cpu()]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def bits(tensor: Tensor) -> Tensor:
    """All values as bytes, (n,) uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(result: Result, expected: Result, num_resumed: int | None = None) -> None:
    """Bit for bit the same model, and the same report but for what it says of the call."""
    (model, report), (expected_model, expected_report) = result, expected
    assert num_resumed in (None, report.num_resumed)
    assert model.keys() == expected_model.keys()
    for name, tensors in expected_model.items():
        for a, b in zip(model[name], tensors, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)), name
    of_the_call = {"seconds": 0.0, "stage_seconds": {}, "block_seconds": {}, "num_resumed": 0}
    assert asdict(report) | of_the_call == asdict(expected_report) | of_the_call
