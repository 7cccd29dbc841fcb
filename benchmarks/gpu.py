"""Everything that needs a GPU to be known, in one command of under eight minutes on an H200.

    python benchmarks/gpu.py                          all parts; gpu.json and gpu.md in benchmarks/results
    python benchmarks/gpu.py --only gate,kernels      some of them
    python benchmarks/gpu.py --render gpu.json        the Markdown again, from a result; needs no GPU
    python benchmarks/gpu.py --smoke                  every part on a CPU with tiny shapes, to test this script

    gate          W3A16 and W4A8 against fp64, and whether tensor cores take fp16 subnormals. What fails is not timed
    kernels       time, share of the copy bandwidth and speed-up over bf16 F.linear at the linears of five VLMs
    cuts          every cut of the W4A8 kernel at three shapes, beside the one that is chosen
    peers         torchao, gemlite, humming and any-precision-llm, where they can be imported
    end_to_end    Qwen2.5-VL-7B and LLaVA-OneVision-7B with random weights: bf16, torchao int4 and ours

Each task is a process with a time budget, and the results are written after each part: what crashes or hangs is
recorded with its traceback, and nothing else is lost. The exit status is 1 only if the gate fails, for W3A16 or for
W4A8. The first three parts need torch and triton; torchao is needed for its own rows and for our tensors in
end_to_end, transformers for end_to_end.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# And how each weighs in sharing out what time is left.
PARTS = {"gate": 4, "kernels": 5, "cuts": 1, "peers": 4, "end_to_end": 6}
PACKAGES = ("torch", "triton", "transformers", "torchao", "gemlite", "humming-kernels", "any_precision_ext")


def main() -> int:
    arguments = parse_arguments()
    if arguments.render:
        results = json.loads(arguments.render.read_text(encoding="utf-8"))
        arguments.render.with_suffix(".md").write_text(render(results), encoding="utf-8")
        return 0
    import_kernels(ROOT)
    if arguments.smoke:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        # What takes seconds, once and before the forks; torch's deterministic mode imports the first.
        import torch._inductor.config  # noqa: F401

        if "end_to_end" in arguments.only:
            import transformers.models.llava_onevision.modeling_llava_onevision
            import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    return run(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_parts, default=tuple(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts, shared out as they go (7.5)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--render", type=Path, metavar="JSON", help="write the Markdown of this result and stop")
    parser.add_argument("--compile-mode", help="torch.compile's mode for decoding, instead of the preferred one")
    return parser.parse_args()


def _parts(text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in chosen)


def import_kernels(root: Path) -> None:
    """Register this checkout's ops without running the root of the package, which imports torchao.

    So the gate and the kernels run where torchao is missing, or does not go with this torch.
    """
    sys.path.insert(0, str(root))
    package = types.ModuleType("mbq_ao")
    package.__path__ = [str(root / "mbq_ao")]
    sys.modules["mbq_ao"] = package
    for ops in ("int3_ops", "w4a8_ops"):
        importlib.import_module(f"mbq_ao.kernels.{ops}")


def run(arguments: argparse.Namespace) -> int:
    from gpu_benchmark import gate
    from gpu_benchmark.tasks import Context

    began = time.monotonic()
    context = Context(smoke=arguments.smoke, fp16=True)
    if arguments.compile_mode:
        context.options["compile_mode"] = arguments.compile_mode
    results: dict[str, Any] = {"about": about(context), "verdict": None, "parts": {}}
    context.options["gigabytes"] = results["about"].get("memory (GB)", 0)
    for i, part in enumerate(arguments.only):
        left = began + 60 * arguments.minutes - time.monotonic()
        share = PARTS[part] / sum(PARTS[later] for later in arguments.only[i:])
        results["parts"][part] = RUN[part](context, left * share)
        if part == "gate":
            results["verdict"] = gate.verdict(results["parts"]["gate"])
            context.fp16 = results["verdict"]["fp16"]
            context.precisions = tuple(results["verdict"]["passed"])
        results["seconds"] = round(time.monotonic() - began, 1)
        write(results, arguments.output)
        print(f"{part}: {results['seconds']} s since the start", flush=True)
        if not context.precisions:
            break
    print(render(results))
    return int(bool(results["verdict"]) and not results["verdict"]["all"])


def run_gate(context: Any, seconds: float) -> list[dict[str, Any]]:
    from gpu_benchmark import gate, tasks

    return tasks.run_together(gate.tasks(seconds), context)


def run_kernels(context: Any, seconds: float) -> list[dict[str, Any]]:
    from gpu_benchmark import kernels, tasks

    return tasks.run_together(kernels.tasks(seconds), context)


def run_cuts(context: Any, seconds: float) -> list[dict[str, Any]]:
    from gpu_benchmark import cuts, tasks

    return tasks.run_together(cuts.tasks(seconds), context) if "W4A8" in context.precisions else []


def run_peers(context: Any, seconds: float) -> list[dict[str, Any]]:
    from gpu_benchmark import peers, tasks

    began = time.monotonic()
    tasks.run_together(peers.warm_tasks(0.35 * seconds, context.smoke), context)
    left = seconds - (time.monotonic() - began)
    return tasks.run_one_by_one(peers.tasks(left), context, left)


def run_end_to_end(context: Any, seconds: float) -> list[dict[str, Any]]:
    from gpu_benchmark import end_to_end, tasks

    todo = end_to_end.tasks(0.35 * seconds / 3, context)  # one that hangs leaves two thirds to the others
    groups = end_to_end.groups(todo, context.options["gigabytes"])
    prepare, turns = 0.65 * seconds / len(groups), 0.35 * seconds / len(groups)
    return [result for group in groups for result in tasks.run_in_turns(group, context, prepare, turns)]


RUN: dict[str, Callable[[Any, float], list[dict[str, Any]]]] = {
    "gate": run_gate,
    "kernels": run_kernels,
    "cuts": run_cuts,
    "peers": run_peers,
    "end_to_end": run_end_to_end,
}


def about(context: Any) -> dict[str, Any]:
    """Device, driver, versions and date. Asked of a child and of nvidia-smi: the parent must not touch CUDA."""
    from gpu_benchmark.tasks import Task, run_together

    result = run_together([Task("device", device_facts, 60.0)], context)[0]
    if result["status"] != "done":
        raise SystemExit(f"no GPU to measure: {result['reason']}\n(--smoke runs the script on a CPU)")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "smoke": context.smoke}
    facts |= result["rows"][0]
    facts |= {
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks now and at most (MHz)": _output(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader,nounits"
        ),
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "versions": versions,
    }
    return facts


def device_facts(context: Any) -> None:
    import torch

    if context.smoke:
        context.emit({"device": f"CPU ({platform.machine()})"})
        return
    properties = torch.cuda.get_device_properties(0)
    context.emit({
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory (GB)": round(properties.total_memory / 1e9, 1),
        "L2 (MB)": round(properties.L2_cache_size / 1e6, 1),
        "CUDA of torch": torch.version.cuda,
    })  # fmt: skip


def _output(*command: str) -> str:
    """The first line of what a command prints, "unknown" where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")


def render(results: dict[str, Any]) -> str:
    from gpu_benchmark.report import render as render_report

    return render_report(results)


if __name__ == "__main__":
    sys.exit(main())
