"""The parts of benchmarks/gpu.py, each a file: what it measures is its docstring.

shapes.py  precisions.py      which matrices; W3A16 and W4A8 in one form
measure.py                    the clock, cold caches, the machine's own copy bandwidth
tasks.py                      a process a task, so that a crash, a hang or a broken CUDA context costs one task
gate.py  kernels.py  cuts.py  peers.py  end_to_end.py        the five parts
gate_w3a16.py  gate_w4a8.py   what the gate asks; gate_bounds.py: what they share; dot.py: its tensor-core product
adapters.py                   other people's kernels
generation.py                 one sequence of end_to_end.py
report.py                     Markdown from the results, with report_kernels.py, report_targets.py and tables.py
"""
