"""What is not the search: importing, finding the scale groups, and packing. Ratios, each within one run.

    python benchmarks/overheads.py             all of it; writes results/overheads.json
    python benchmarks/overheads.py --smoke     small sizes, seconds; writes nothing

imports    `import mbq_ao` over the import of what it needs, torch and torchao, and over those and transformers, beside
           which it is used: processes of their own. The modules that it loads are counted.
groups     the time for finding the groups of a model of several equal layers over that of the whole calibration, and
           how many layers were probed: one for each distinct structure.
packing    MBQInt3Tensor.from_hp and MBQW4A8Tensor.from_hp over a clone of the same weight, and over torchao's own
           rounding to int4 without packing (choose_qparams_affine, quantize_affine), in turns. On a GPU also the
           seconds for the linears of a 7B model; elsewhere an estimate of them from bytes moved, which is arithmetic
           and says so.

CPU times are those of this process, on one thread: what else the machine does hardly changes them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from small_vlm import Size, build_model, build_samples, device_name
from torchao.quantization import quant_primitives as torchao_primitives

from mbq_ao import MBQInt3Tensor, MBQW4A8Tensor, mbq_config, quantize_
from mbq_ao.calibration import mbq
from mbq_ao.calibration.scale_groups import BlockProber

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
GROUP = 128
# N, K of the linears of a decoder layer of Qwen2.5-VL-7B, of which there are 28.
LINEARS_7B = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)]
LAYERS_7B = 28
WEIGHTS_7B = LAYERS_7B * sum(n * k for n, k in LINEARS_7B)
BANDWIDTH = 1e12  # bytes/s, for the estimate: about that of a 24 GB card


# --- imports


def imports(repeats: int) -> dict[str, Any]:
    """CPU seconds of `import mbq_ao` over those of what is imported before it: medians."""
    found: dict[str, Any] = {}
    for modules in ("torch, torchao.quantization", "torch, torchao.quantization, transformers"):
        runs = [_import(modules) for _ in range(repeats)]
        found[modules] = {
            "mbq_ao_over_it": round(statistics.median(run["ours"] / run["before"] for run in runs), 4),
            "mbq_ao_seconds": round(statistics.median(run["ours"] for run in runs), 4),
            "modules_of_mbq_ao": runs[0]["modules"],
            "other_modules_it_loads": runs[0]["others"],
        }
    return found


def _import(modules: str) -> dict[str, Any]:
    code = f"""
import json, logging, sys, time
logging.disable()
began = time.process_time()
import {modules}
between, known = time.process_time(), set(sys.modules)
import mbq_ao
ended, new = time.process_time(), set(sys.modules) - known
ours = sum(name.lstrip("_").startswith("mbq_ao") for name in new)
print(json.dumps(dict(before=between - began, ours=ended - between, modules=ours, others=len(new) - ours)))
"""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- scale groups


def groups(size: Size) -> dict[str, Any]:
    """One calibration; how much of it finding groups took, and how often a layer was probed."""
    spent: dict[str, list[float]] = {"find_groups": [], "find_all": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name].append(time.process_time() - began)

        return run

    originals = mbq.find_groups, BlockProber.find_all
    mbq.find_groups, BlockProber.find_all = timed("find_groups", originals[0]), timed("find_all", originals[1])
    model, samples = build_model(size), build_samples(size, size.samples, seed=0)
    try:
        began = time.process_time()
        quantize_(model, mbq_config(samples, recipe="mbq"), progress=False)
        whole = time.process_time() - began
    finally:
        mbq.find_groups, BlockProber.find_all = originals
    found = sum(spent["find_groups"])
    return {
        "layers": size.layers,
        "tokens": size.samples * size.tokens,
        "layers_probed": len(spent["find_all"]),
        "share_of_calibration": round(found / whole, 4),
        # It is the same for any number of layers and samples; the rest grows with their product.
        "share_at_28_layers_128_samples": round(
            found / (found + (whole - found) * LAYERS_7B / size.layers * 128 / size.samples), 6
        ),
    }


# --- packing


def packing(n: int, k: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Times of from_hp over those of a clone and of torchao's rounding; medians over rounds of turns."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    contenders: dict[str, Callable[[], object]] = {
        "clone": w.clone,
        "torchao int4 rounding": lambda: _torchao_int4(w),
        "MBQInt3Tensor": lambda: MBQInt3Tensor.from_hp(w, GROUP),
        "MBQW4A8Tensor": lambda: MBQW4A8Tensor.from_hp(w),
    }
    _check(w)
    rounds = []
    for _ in range(repeats):
        rounds.append({name: _seconds(run, device) for name, run in contenders.items()})
    row: dict[str, Any] = {"n": n, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    for name in ("MBQInt3Tensor", "MBQW4A8Tensor"):
        with Traffic() as traffic:
            packed = contenders[name]()
        row[name] = {
            "over_clone": round(statistics.median(r[name] / r["clone"] for r in rounds), 2),
            "over_torchao_int4_rounding": round(
                statistics.median(r[name] / r["torchao int4 rounding"] for r in rounds), 2
            ),
            "million_weights_per_s": round(n * k / statistics.median(r[name] for r in rounds) / 1e6),
            "ops": traffic.ops,
            "bytes_moved_per_weight": round(traffic.bytes / (n * k), 1),
            "packed_bytes_per_weight": round(packed.quantized_nbytes() / (n * k), 3),
        }
    return row


def _check(w: Tensor) -> None:
    """What is timed is right: from_hp is fake_quantize, and W4A8 within half a step."""
    if not torch.equal(MBQInt3Tensor.from_hp(w, GROUP).dequantize(), MBQInt3Tensor.fake_quantize(w, GROUP)):
        raise SystemExit("MBQInt3Tensor.from_hp is wrong: nothing was timed")
    packed = MBQW4A8Tensor.from_hp(w)
    error = (packed.dequantize().float() - w.float()).abs()
    if not (error <= 0.5 * packed.scale.float() + torch.finfo(w.dtype).eps * w.float().abs()).all():
        raise SystemExit("MBQW4A8Tensor.from_hp is wrong: nothing was timed")


def _torchao_int4(w: Tensor) -> Tensor:
    options = {"quant_min": 0, "quant_max": 15}
    block = (1, GROUP)
    scale, zero_point = torchao_primitives.choose_qparams_affine(
        w, torchao_primitives.MappingType.ASYMMETRIC, block, torch.uint8, **options
    )
    return torchao_primitives.quantize_affine(w, block, scale, zero_point, torch.uint8, **options)


def _seconds(run: Callable[[], object], device: str) -> float:
    """CPU time where it is the CPU that works, on one thread; else wall time, with the device idle before and after."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.accelerator.synchronize()
    began = clock()
    run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - began


class Traffic(TorchDispatchMode):
    """Counts operations that compute or copy, and the bytes of what they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        old = {t.untyped_storage().data_ptr() for t in given}
        in_place = func._schema.is_mutable
        if made and (in_place or any(t.untyped_storage().data_ptr() not in old for t in made)):
            self.ops += 1
            # What broadcasts is read once, from a cache after that.
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in [*given, *made])
        return result


def estimate_7b(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds for a 7B model's linears if bytes moved at BANDWIDTH were all that takes time. Not a measurement."""
    of_bf16 = [row for row in rows if row["dtype"] == "bfloat16"]
    return {
        "what": "an estimate on paper: bytes moved by all operations over a bandwidth; no GPU was measured",
        "weights": WEIGHTS_7B,
        "bandwidth_bytes_per_s": BANDWIDTH,
        **{
            name: round(max(row[name]["bytes_moved_per_weight"] for row in of_bf16) * WEIGHTS_7B / BANDWIDTH, 2)
            for name in ("MBQInt3Tensor", "MBQW4A8Tensor")
        },
    }


def measure_7b(device: str) -> dict[str, Any]:
    """Seconds for packing the linears of one layer of a 7B model, times its layers, on the device."""
    found: dict[str, Any] = {"what": "measured: one layer's linears, times the number of layers", "weights": WEIGHTS_7B}
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for n, k in LINEARS_7B]
    runs = {"MBQInt3Tensor": lambda w: MBQInt3Tensor.from_hp(w, GROUP), "MBQW4A8Tensor": MBQW4A8Tensor.from_hp}
    for name, run in runs.items():
        times = [_seconds(lambda run=run: [run(w) for w in weights] and None, device) for _ in range(4)]
        found[name] = round(statistics.median(times[1:]) * LAYERS_7B, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes; writes nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        size = Size(hidden=256, intermediate=256, layers=4, samples=2, image_side=2, words=20)
        shapes, repeats, import_repeats = [(256, 512)], 3, 1
    else:
        size = Size(hidden=256, intermediate=512, layers=12, samples=16)
        shapes, repeats, import_repeats = [(4096, 4096), (18944, 3584)], 7, 3
    dtypes = (torch.bfloat16, torch.float32)
    rows = [packing(n, k, dtype, args.device, repeats) for n, k in shapes for dtype in dtypes]
    results = {
        "device": device_name(args.device),
        "threads": 1,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
        "imports": imports(import_repeats),
        "groups": groups(size),
        "packing": rows,
        "packing_7b": estimate_7b(rows) if args.device == "cpu" else measure_7b(args.device),
    }
    print(json.dumps(results, indent=1))
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "overheads.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
