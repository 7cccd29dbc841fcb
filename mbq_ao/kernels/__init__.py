"""Kernels: they know shapes and bits, never modules or models, and import torch and triton only.

Of both precisions:

reference.py     every op in plain fp32 torch: the spec and the oracle
checks.py        what the ops check of their arguments; launch.py: what every launcher of a Triton kernel needs
devices.py       a model of a GPU: clock cycles of a kernel, from what its programs ask of an SM
grouped.py       several linears of one input by one call; sums.py: sums of parts of K
expert_ops.py    torch.ops.mbq_ao.*_grouped_mm, the door to products with the stacked weights of experts

W3A16, 3-bit weights:

int3_ops.py      torch.ops.mbq_ao.int3_*, the door
int3_layout.py   where bit b of weight (n, k) lives: pack and unpack
fragments.py     packed words to tensor-core operands
int3_gemv.py     few rows of x, decoding; gemv_config.py: how it is cut, gemv_loads.py: what it loads
int3_gemm.py     many rows, prefill: weights dequantized in registers; gemm_config.py: how it is cut, up to where
int3_linear.py   the Triton kernels behind one function, imported only where they can run
choice.py        which of them serves: arithmetic, or what mbq_ao.tune measured
int3_cpu.py      the linear layer on a CPU

W4A8, 4-bit weights and 8-bit activations:

w4a8_ops.py      torch.ops.mbq_ao.w4a8_* and int4_*, the door
int4_layout.py   where a weight lives: pack and unpack
w4a8_gemm.py     tokens to int8, then integer tensor cores, any number of rows; w4a8_config.py: how it is cut
w4a8_cpu.py      the linear layer without a kernel
"""
