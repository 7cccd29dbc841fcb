"""Markdown from the results of benchmarks/gpu.py: a function of the JSON alone."""

from __future__ import annotations

from typing import Any

from gpu_benchmark import report_kernels
from gpu_benchmark.report_targets import models, speed_up, targets
from gpu_benchmark.tables import MISSING, Row, errors, last_line, not_reached, rows_of, table


def render(results: dict[str, Any]) -> str:
    """All tables of the parts that ran, then what failed."""
    parts = results["parts"]
    sections = [_about(results)]
    if "gate" in parts:
        sections.append(_gate(results))
    kernel_rows = rows_of(parts.get("kernels", []))
    sections.append(targets(kernel_rows, models(parts.get("end_to_end", []))))
    if "kernels" in parts:
        sections.append(report_kernels.kernels(kernel_rows))
    if "cuts" in parts:
        sections.append(report_kernels.cuts(rows_of(parts["cuts"])))
    if "peers" in parts:
        sections.append(report_kernels.peers(parts["peers"], kernel_rows))
    if "end_to_end" in parts:
        sections.append(_end_to_end(parts["end_to_end"]))
    sections.append(_failures(parts))
    return "\n\n".join(section for section in sections if section) + "\n"


def _about(results: dict[str, Any]) -> str:
    about = results["about"]
    title = "# mbq_ao on a GPU"
    if about.get("smoke"):
        title += (
            "\n\n**Smoke run on a CPU with tiny shapes: it shows that the script works. Its numbers mean nothing.**"
        )
    lines = [f"- {name}: {value}" for name, value in about.items() if name not in ("smoke", "versions")]
    lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    return title + "\n\n" + "\n".join(lines)


def _gate(results: dict[str, Any]) -> str:
    verdict = results["verdict"]
    exact = {
        True: "Tensor cores take fp16 subnormals exactly.",
        False: "Tensor cores do NOT take fp16 subnormals exactly: bf16 is the fallback, and fp16 is not timed.",
        None: "Whether tensor cores take fp16 subnormals exactly is not known: its check failed.",
    }
    lines = [
        "## Correctness gate: "
        + ", ".join(
            f"{name} {'passed' if of['passed'] else 'FAILED, not timed'}" for name, of in verdict["precisions"].items()
        ),
        "",
        f"{verdict['cases']} cases against fp64. {exact[verdict['subnormals_exact']]}",
        "",
        *table(
            ["case", "cases", "wrong", "largest error / bound", "largest rms / bound", "status"],
            [_gate_row(task) for task in results["parts"]["gate"]],
        ),
    ]
    for row in verdict["wrong"]:
        lines.append(f"- wrong: {row}")
    if failed := [task for of in verdict["precisions"].values() for task in of["failed"]]:
        lines.append("- failed: " + ", ".join(failed))
    rows = rows_of(results["parts"]["gate"])
    return "\n".join([*lines, *errors(rows), *not_reached(rows)])


def _gate_row(task: Row) -> list[str]:
    cases = [row for row in task["rows"] if "worst" in row]
    if not cases:
        return [task["name"], "0", MISSING, MISSING, MISSING, task["status"]]
    wrong = sum(not row["ok"] for row in cases)
    largest = [f"{max(row[name] for row in cases):.2f}" for name in ("worst", "rms")]
    return [task["name"], str(len(cases)), str(wrong), *largest, task["status"]]


def _end_to_end(tasks: list[Row]) -> str:
    header = [
        "model", "weights", "tokens/s", "over bf16", "first token (ms)", "over bf16", "of it vision", "of it prompt",
        "prompt in a CUDA graph (ms)", "decode step (ms)", "weights (GB)", "peak memory (GB)", "decode step runs",
    ]  # fmt: skip
    found = models(tasks)

    def over_bf16(row: Row, name: str) -> str:
        ratio = speed_up(row, found, name)
        return MISSING if ratio is None else f"{ratio:.2f}x"

    body = []
    for row in found:
        graph = row.get("prompt_graph_s")
        way = f"torch.compile {row['compile']}" if row["compile"] else "eager"
        body.append([
            f"{row['model']} ({row['prompt_tokens']} + {row['new_tokens']} tokens)", row["precision"],
            f"{row['tokens_per_s']:.1f}", over_bf16(row, "decode_s"), f"{row['first_token_s'] * 1e3:.1f}",
            over_bf16(row, "first_token_s"), *(f"{row[name] * 1e3:.1f}" for name in ("vision_s", "prompt_s")),
            MISSING if graph is None else f"{graph * 1e3:.1f}",
            f"{1e3 / row['tokens_per_s']:.2f}", f"{row['weight_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}",
            way + (", CUDA graph" if row["graph"] else ""),
        ])  # fmt: skip
    lines = ["## End to end", "", "Random weights, one sequence, greedy, static cache.", "", *table(header, body)]
    for row in found:
        if not row["same_token_as_eager"]:
            lines.append(f"- {row['model']}, {row['precision']}: this step's first token is not the eager step's")
        if "prompt_graph_error" in row:
            reason = last_line(row["prompt_graph_error"])
            lines.append(f"- {row['model']}, {row['precision']}: no CUDA graph of the prompt: {reason}")
        for tried in row["tried"]:
            lines.append(
                f"- {row['model']}, {row['precision']}: {tried['mode']}, graph {tried['graph']} failed: "
                f"{last_line(tried['error'])}"
            )
    for row in found:
        if any("us" in kernel for kernel in row["kernels"]):
            top = [[kernel["name"], str(kernel["calls"]), f"{kernel['us']:.0f}"] for kernel in row["kernels"]]
            lines += ["", f"### Where a decode step goes: {row['model']}, {row['precision']}", ""]
            lines += table(["kernel", "calls", "microseconds"], top)
    return "\n".join(lines)


def _failures(parts: dict[str, list[Row]]) -> str:
    failed = [(part, task) for part, tasks in parts.items() for task in tasks if task["status"] != "done"]
    if not failed:
        return ""
    same: dict[str, list[str]] = {}
    for part, task in failed:
        detail = (task.get("traceback") or "\n".join(task.get("log", []))).strip()
        shown = "\n".join(["```", *detail.splitlines()[-15:], "```"])
        same.setdefault(f"{task['reason']}\n\n{shown}", []).append(f"{part}, {task['name']} ({task['seconds']} s)")
    lines = ["## What failed"]
    for text, names in same.items():
        lines += ["", f"**{'; '.join(names)}**: {text}"]
    return "\n".join(lines)
