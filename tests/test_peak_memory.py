"""The counter of bytes alive (tests/peak_memory.py)."""

import torch
from peak_memory import PeakBytes


def test_the_count_follows_allocations_and_releases():
    with PeakBytes() as memory:
        x = torch.zeros(1024)
        y = x.view(2, 512)  # no bytes
        z = x + 1
        del z
        w = torch.ones(256)
    assert (memory.peak, memory.now) == (8192, 4096 + 1024)
    del x, y, w
    assert memory.now == 0
