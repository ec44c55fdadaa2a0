"""Peak memory on the CPU, on sequences of allocations whose peak is known."""

import torch

from repkern.bench.memory import live_bytes, peak_bytes

MIB = 2**20


def block(mib):
    return torch.full((mib * MIB,), 1, dtype=torch.uint8)


def test_peak_is_the_most_alive_at_once():
    def run():
        first = block(3)
        del first
        second, third = block(2), block(4)
        return second, third

    assert 6 * MIB <= peak_bytes(run, [block(1)], "cpu") - MIB < 6 * MIB + 4096


def test_what_lived_before_counts_throughout():
    resident = [block(8)]
    peak = peak_bytes(lambda: block(4), resident, "cpu")
    assert 12 * MIB <= peak < 12 * MIB + 4096


def test_shared_storage_counts_once():
    whole = block(2)
    assert live_bytes([whole, whole[:MIB], whole.view(2, MIB)]) == 2 * MIB
