"""Kernels: they know shapes and bits, never modules or models, and import torch and triton only.

layout.py        where bit b of weight (n, k) lives: pack and unpack
reference.py     every op in plain fp32 torch: the spec and the oracle
int3_linear.py   the Triton kernels, imported only where they can run
int3_cpu.py      the linear layer on a CPU
ops.py           torch.ops.mbq_ao.*, the only door
"""
