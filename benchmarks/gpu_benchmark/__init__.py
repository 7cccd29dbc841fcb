"""The parts of benchmarks/gpu.py, each a file: what it measures is its docstring.

shapes.py       which matrices
measure.py      the clock, cold caches, the machine's own copy bandwidth
tasks.py        a process a task, so that a crash, a hang or a broken CUDA context costs one task
gate.py  kernels.py  peers.py  end_to_end.py        the four parts
generation.py   one sequence of end_to_end.py
report.py       Markdown from the results, and nothing else
"""
