"""Kernels: they know shapes and bits, never modules or models, and import torch and triton only.

layout.py        where bit b of weight (n, k) lives: pack and unpack
reference.py     every op in plain fp32 torch: the spec and the oracle
fragments.py     from packed words to tensor-core operands, in registers
int3_gemv.py     the Triton kernel for few rows of x; Triton is imported only where it can run
gemv_config.py   how that kernel is cut into programs
int3_linear.py   the Triton kernels for more rows; which of them serves how many
launch.py        what every launcher needs
ops.py           torch.ops.mbq_ao.*, the only door
"""
