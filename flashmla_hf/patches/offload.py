"""Tensors parked in pinned host memory, copied beside the computation.

One stream of its own copies both ways, so that a slot's next copy waits for its last. Pinned memory comes in blocks of a power
of two (torch rounds pinned allocations up to one) that are reused from step to step; a tensor takes as many as it needs.

Lifetimes, without ``record_stream``: a tensor on its way to the host is held until an event says that it has left, or until
the compute stream has been told to wait for that event; a tensor on its way back is allocated by the compute stream, which
waits for its arrival before anybody gets it.

Without CUDA the same code copies to ordinary memory at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable

import torch

from flashmla_hf import host_memory
from flashmla_hf.patches import memory

BLOCK = 2**25
# Left to the host whatever happens: data loading, checkpoints, other processes.
RESERVE = 2 * memory.GIB
# Tensors on their way out that may be held on the GPU at a time.
MOST_LEAVING = 2


class HostArena:
    """Blocks of host memory, pinned where there is a GPU. They are never given back to the system before the arena goes."""

    def __init__(self, is_pinned: bool):
        self.is_pinned = is_pinned
        self.free: list[torch.Tensor] = []
        self.num_blocks = 0

    @staticmethod
    def blocks_for(num_bytes: int) -> int:
        return -(-num_bytes // BLOCK)

    def take(self, num_bytes: int) -> list[torch.Tensor]:
        """Blocks for ``num_bytes``; RuntimeError where the host has no more."""
        number = self.blocks_for(num_bytes)
        while len(self.free) < number:
            available = host_memory.available_bytes()
            if available < BLOCK + RESERVE:
                missing, held = (number - len(self.free)) * BLOCK / memory.GIB, self.num_blocks * BLOCK / memory.GIB
                raise RuntimeError(
                    f"flashmla_hf.patch: patch 'offload': host memory: expected {missing:.1f} GiB beyond a reserve of "
                    f"{RESERVE / memory.GIB:.0f} GiB, got {available / memory.GIB:.1f} GiB available, with {held:.1f} GiB "
                    "in use here already. Use shorter sequences, offload fewer layers (offload=number), or leave it out: "
                    "patches=[...] without 'offload'"
                )
            self.free.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.is_pinned))
            self.num_blocks += 1
        return [self.free.pop() for _ in range(number)]

    def give(self, blocks: list[torch.Tensor]) -> None:
        self.free.extend(blocks)


class Offloader:
    """The stream and the arena of one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arena = HostArena(is_pinned=device.type == "cuda")
        self._leaving: deque[tuple[object, tuple[torch.Tensor, ...]]] = deque()

    def park(self, *tensors: torch.Tensor, next_needed: Callable[[], Offloaded | None] = lambda: None) -> Offloaded:
        """Copies ``tensors`` to the host. ``next_needed``: which parked tensors to bring back once these are fetched."""
        tensors = tuple(x.detach().contiguous() for x in tensors)
        parked = Offloaded(self, tensors, next_needed)
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record(self.stream)
            self._leaving.append((event, tensors))
            self._let_go(MOST_LEAVING)
        return parked

    def _let_go(self, most: int) -> None:
        """Drops tensors that have left; beyond ``most`` the compute stream waits for the oldest first."""
        while self._leaving and (len(self._leaving) > most or self._leaving[0][0].query()):
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)

    @contextlib.contextmanager
    def beside(self):
        """Within: copies on the own stream, after everything the compute stream was told so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield


class Offloaded:
    """Tensors that live on the host until somebody fetches them, any number of times; their blocks are free once nobody
    holds this object."""

    def __init__(
        self, offloader: Offloader, tensors: tuple[torch.Tensor, ...], next_needed: Callable[[], Offloaded | None]
    ):
        self._offloader, self._next_needed = offloader, next_needed
        self._like = [(x.shape, x.dtype) for x in tensors]
        self._blocks: list[list[torch.Tensor]] = []
        self._coming: tuple[torch.Tensor, ...] | None = None
        self._arrived = None
        for x in tensors:
            self._blocks.append(offloader.arena.take(x.numel() * x.element_size()))
        with offloader.beside():
            for x, blocks in zip(tensors, self._blocks, strict=True):
                for piece, block in _pieces(x, blocks):
                    block.copy_(piece, non_blocking=True)

    def start_fetching(self) -> None:
        """Begins the copy back, if it has not begun."""
        if self._coming is not None:
            return
        offloader = self._offloader
        self._coming = tuple(torch.empty(shape, dtype=dtype, device=offloader.device) for shape, dtype in self._like)
        with offloader.beside():
            for x, blocks in zip(self._coming, self._blocks, strict=True):
                for piece, block in _pieces(x, blocks):
                    piece.copy_(block, non_blocking=True)
            if offloader.stream is not None:
                self._arrived = torch.cuda.Event()
                self._arrived.record(offloader.stream)

    def fetch(self) -> tuple[torch.Tensor, ...]:
        """The tensors, on their device; the copy of those needed next begins."""
        self._offloader._let_go(0)
        self.start_fetching()
        tensors = self._arrive()
        upcoming = self._next_needed()
        if upcoming is not None:
            upcoming.start_fetching()
        return tensors

    def _arrive(self) -> tuple[torch.Tensor, ...]:
        tensors, self._coming = self._coming, None
        if self._arrived is not None:
            torch.cuda.current_stream(self._offloader.device).wait_event(self._arrived)
            self._arrived = None
        return tensors

    def __del__(self):
        if self._coming is not None:  # nobody fetched it: its memory must not be reused before the copy is over
            self._arrive()
        for blocks in self._blocks:
            self._offloader.arena.give(blocks)


def _pieces(x: torch.Tensor, blocks: list[torch.Tensor]):
    """Pairs (part of x as bytes, as much of a block), for contiguous x."""
    flat = x.view(-1).view(torch.uint8)
    for i, block in enumerate(blocks):
        piece = flat[i * BLOCK : (i + 1) * BLOCK]
        yield piece, block[: piece.numel()]
