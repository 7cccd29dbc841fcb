"""A model of a GPU: the clock cycles of a kernel, from what its programs ask of an SM. Until a GPU has measured it.

Programs that fit on an SM together share it, and hide each other's latency. The whole is never shorter than the packed
weight takes from memory, and a kernel is taken to reach _EFFICIENCY of all that. Splitting K costs one more kernel and
the fp32 parts, through L2.

Figures that describe a GPU are its maker's, per SM and clock, but for the memory bandwidth of H200, measured, and the
rate of L2 and of mma.sync on Hopper and later, estimated.
"""

import dataclasses

LAUNCH = 4000  # cycles between two kernels
_EFFICIENCY = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What one SM does in one clock, and how many there are."""

    num_sms: int
    memory: float  # bytes
    l2: float  # bytes
    mma: int  # flops of mma.sync, 16 bits, accumulated in fp32; int8 has twice as many
    peak: int  # flops of the fastest tensor instruction; int8 as above
    shared_memory: int  # bytes, in all

    def kernel_cycles(
        self,
        *,
        programs: int,
        steps: int,
        step: float,
        latency: float,
        shared_memory: int,
        registers: int,
        bytes_read: float,
        split_outputs: int,
    ) -> float:
        """Cycles of a kernel of `programs`, each of `steps` steps of a loop.

        step: cycles that a step takes of an SM, shared by its programs.  latency: those it takes at least.
        shared_memory, registers: of a program.  split_outputs: how many fp32 parts are written and added; 0 for none.
        """
        resident = min(self.shared_memory // shared_memory, 65536 // registers)
        per_sm = ceil_div(programs, self.num_sms)
        rounds = ceil_div(per_sm, max(1, resident))
        cycles = steps * max(per_sm * step, rounds * latency)
        total = LAUNCH + max(cycles, bytes_read / (self.memory * self.num_sms)) / _EFFICIENCY
        if split_outputs:  # they stay in L2
            total += LAUNCH + 8 * split_outputs / (self.l2 * self.num_sms)
        return total


_DEVICES = {
    (8, 0): Device(num_sms=108, memory=13.1, l2=32, mma=2048, peak=2048, shared_memory=164 << 10),
    (8, 6): Device(num_sms=128, memory=3.1, l2=16, mma=512, peak=512, shared_memory=100 << 10),
    (9, 0): Device(num_sms=132, memory=16.4, l2=30, mma=2560, peak=4096, shared_memory=227 << 10),
    (10, 0): Device(num_sms=148, memory=29, l2=40, mma=2048, peak=8192, shared_memory=227 << 10),
    (12, 0): Device(num_sms=170, memory=4.4, l2=16, mma=512, peak=512, shared_memory=100 << 10),
}


def device_of(capability: tuple[int, int]) -> Device:
    """The newest known GPU that is not newer than this one."""
    return _DEVICES[max((c for c in _DEVICES if c <= capability), default=(8, 0))]


def row_bucket(num_rows: int) -> int:
    """num_rows rounded up to three significant bits and a multiple of 16: a choice for each is remembered."""
    unit = max(16, 1 << max(0, num_rows.bit_length() - 3))
    return ceil_div(num_rows, unit) * unit


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
