"""Kernels: they know shapes and bits, never modules or models, and import torch and triton only.

layout.py        where bit b of weight (n, k) lives: pack and unpack
reference.py     every op in plain fp32 torch: the spec and the oracle
fragments.py     packed words to tensor-core operands; launch.py: what every launcher needs
int3_gemv.py     few rows of x, decoding; gemv_config.py: how it is cut, gemv_loads.py: what it loads
int3_gemm.py     many rows, prefill: weights dequantized in registers; gemm_config.py: how it is cut, up to where
int3_linear.py   the Triton kernels behind one function, imported only where they can run
choice.py        which of them serves: arithmetic, or what mbq_ao.tune measured
int3_cpu.py      the linear layer on a CPU
ops.py           torch.ops.mbq_ao.*, the only door
"""
