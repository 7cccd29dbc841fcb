"""Checkpoints of other libraries, in and out. Start reading at load.py; docs/interchange.md is for users.

affine.py               a weight, unpacked: between every format and our tensors
gptq.py, awq.py         how these formats pack it; bits.py, parts.py: what they share
torchao.py              torchao's tensors
load.py                 import_checkpoint
torchao_checkpoint.py   save_torchao, register_with_torchao
"""
