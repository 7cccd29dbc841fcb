"""Fields of a few bits in int32 words, as GPTQ packs them: a stream of bits, lowest first, that ignores word borders.

Of 4 bits, eight are in a word. Of 3 bits, 32 are in three words, and two of those lie across a border.
"""

import math

import torch
from torch import Tensor


def fields_per_block(bits: int) -> int:
    """How many fields fill a whole number of words: 8 of 4 bits, 32 of 3."""
    return 32 // math.gcd(bits, 32)


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """int32 (words, ...) -> uint8 (words * 32 / bits, ...): the fields along the first dimension, whole blocks.

    Of int64 the lower halves are taken.
    """
    blocks = (words.to(torch.int64) & 0xFFFFFFFF).unflatten(0, (-1, bits // math.gcd(bits, 32)))
    fields = words.new_empty((blocks.shape[0], fields_per_block(bits), *words.shape[1:]), dtype=torch.uint8)
    for index in range(fields.shape[1]):
        word, shift = divmod(index * bits, 32)
        value = blocks[:, word] >> shift
        if shift + bits > 32:
            value |= blocks[:, word + 1] << (32 - shift)
        fields[:, index] = value & (2**bits - 1)
    return fields.flatten(0, 1)


def pack_bits(fields: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 (fields, ...) -> int32 (fields * bits / 32, ...)."""
    blocks = fields.unflatten(0, (-1, fields_per_block(bits)))
    words = fields.new_zeros((blocks.shape[0], bits // math.gcd(bits, 32), *fields.shape[1:]), dtype=torch.int64)
    for index in range(blocks.shape[1]):
        word, shift = divmod(index * bits, 32)
        value = blocks[:, index].to(torch.int64) << shift
        words[:, word] |= value & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= value >> 32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(0, 1)
