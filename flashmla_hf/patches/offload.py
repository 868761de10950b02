"""Tensors parked in pinned host memory, with copies that run beside the computation.

One extra stream copies in both directions, so that the next copy of a block waits for the last one. Pinned memory has blocks
of a power of two (torch rounds pinned allocations up to one), which are reused from step to step. A tensor takes as many blocks
as it needs.

Lifetimes work without ``record_stream``. A tensor on its way to the host is held until an event says that it has left, or until
the compute stream has been told to wait for that event. A tensor on its way back is allocated by the compute stream, which
waits for its arrival before anybody gets it.

Without CUDA the same code copies to ordinary memory at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch

from flashmla_hf import host_memory
from flashmla_hf.patches import memory

BLOCK = 2**25
# Bytes that are always left to the host: data loading, checkpoints, other processes.
RESERVE = 2 * memory.GIB
# The most tensors on their way out that are held on the GPU at a time.
MOST_LEAVING = 2


class HostArena:
    """Blocks of host memory, pinned if there is a GPU. They return to the system only when the arena is deleted."""

    def __init__(self, is_pinned: bool) -> None:
        self.is_pinned = is_pinned
        self.free: list[torch.Tensor] = []
        self.num_blocks = 0

    @staticmethod
    def blocks_for(num_bytes: int) -> int:
        return -(-num_bytes // BLOCK)

    def allocate(self, num_bytes: int) -> list[torch.Tensor]:
        """Blocks for ``num_bytes``. Raises RuntimeError if the host has no memory left for them."""
        number = self.blocks_for(num_bytes)
        while len(self.free) < number:
            available = host_memory.available_bytes()
            if available < BLOCK + RESERVE:
                missing, held = (number - len(self.free)) * BLOCK / memory.GIB, self.num_blocks * BLOCK / memory.GIB
                raise RuntimeError(
                    f"flashmla_hf.patch: patch 'offload': host memory: expected {missing:.1f} GiB beyond a reserve of "
                    f"{RESERVE / memory.GIB:.0f} GiB, got {available / memory.GIB:.1f} GiB available, with {held:.1f} GiB "
                    "in use here already. Use shorter sequences, offload fewer layers (offload=NUMBER), or exclude it: "
                    "flashmla_hf.patch(model, exclude=['offload'])"
                )
            self.free.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.is_pinned))
            self.num_blocks += 1
        return [self.free.pop() for _ in range(number)]

    def free_blocks(self, blocks: list[torch.Tensor]) -> None:
        self.free.extend(blocks)


class Offloader:
    """The copy stream and the arena of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arena = HostArena(is_pinned=device.type == "cuda")
        self._leaving: deque[tuple[torch.cuda.Event, tuple[torch.Tensor, ...]]] = deque()

    def park(self, *tensors: torch.Tensor, next_needed: Callable[[], Offloaded | None] = lambda: None) -> Offloaded:
        """Copies ``tensors`` to the host. Their fetch also starts the copy back of the tensors that ``next_needed`` gives."""
        tensors = tuple(x.detach().contiguous() for x in tensors)
        parked = Offloaded(self, tensors, next_needed)
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record(self.stream)
            self._leaving.append((event, tensors))
            self.release(MOST_LEAVING)
        return parked

    def release(self, most: int) -> None:
        """Drops tensors that have left. If more than ``most`` have not, the compute stream waits for the oldest of them."""
        while self._leaving and (len(self._leaving) > most or self._leaving[0][0].query()):
            event, _ = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)

    @contextlib.contextmanager
    def copy_stream(self) -> Iterator[None]:
        """Inside: copies run on the copy stream, after everything that is queued on the compute stream."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield


class Offloaded:
    """Tensors on the host. They can be fetched any number of times. Their blocks are free when this object is deleted."""

    def __init__(
        self, offloader: Offloader, tensors: tuple[torch.Tensor, ...], next_needed: Callable[[], Offloaded | None]
    ) -> None:
        self._offloader, self._next_needed = offloader, next_needed
        self._like = [(x.shape, x.dtype) for x in tensors]
        self._blocks: list[list[torch.Tensor]] = []
        self._coming: tuple[torch.Tensor, ...] | None = None
        self._arrived: torch.cuda.Event | None = None
        for x in tensors:
            self._blocks.append(offloader.arena.allocate(x.numel() * x.element_size()))
        with offloader.copy_stream():
            for x, blocks in zip(tensors, self._blocks, strict=True):
                for piece, block in _pieces(x, blocks):
                    block.copy_(piece, non_blocking=True)

    def start_fetching(self) -> None:
        """Starts the copy back, unless it has started."""
        if self._coming is not None:
            return
        offloader = self._offloader
        self._coming = tuple(torch.empty(shape, dtype=dtype, device=offloader.device) for shape, dtype in self._like)
        with offloader.copy_stream():
            for x, blocks in zip(self._coming, self._blocks, strict=True):
                for piece, block in _pieces(x, blocks):
                    piece.copy_(block, non_blocking=True)
            if offloader.stream is not None:
                self._arrived = torch.cuda.Event()
                self._arrived.record(offloader.stream)

    def fetch(self) -> tuple[torch.Tensor, ...]:
        """The tensors, on their device. Starts the copy back of the tensors that are needed next."""
        self._offloader.release(0)
        self.start_fetching()
        tensors = self._arrive()
        upcoming = self._next_needed()
        if upcoming is not None:
            upcoming.start_fetching()
        return tensors

    def _arrive(self) -> tuple[torch.Tensor, ...]:
        tensors, self._coming = self._coming or (), None
        if self._arrived is not None:
            torch.cuda.current_stream(self._offloader.device).wait_event(self._arrived)
            self._arrived = None
        return tensors

    def __del__(self) -> None:
        if self._coming is not None:  # not fetched: its memory must not be reused before the copy is over
            self._arrive()
        for blocks in self._blocks:
            self._offloader.arena.free_blocks(blocks)


def _pieces(x: torch.Tensor, blocks: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (part of x as bytes, equal part of a block), for contiguous x."""
    flat = x.view(-1).view(torch.uint8)
    for i, block in enumerate(blocks):
        piece = flat[i * BLOCK : (i + 1) * BLOCK]
        yield piece, block[: piece.numel()]
