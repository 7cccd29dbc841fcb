"""Kernels: they know shapes and bits, never modules or models, and import torch and triton only."""
