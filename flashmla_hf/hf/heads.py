"""Which heads of a layer this process computes, if DeepSpeed's Ulysses attention has divided them among processes.

Ulysses hands queries, keys and values of this process's heads to the attention function, and every other argument as the layer
gave it: one with a number for each head is of all heads.
"""

from __future__ import annotations

import sys

import torch


def own_heads(x: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """The part of ``x``, [heads of the layer], that belongs to the ``heads`` query heads of this call.

    ``x`` itself if it has ``heads`` numbers or if nothing is divided: a wrong size is named where it is read.
    """
    if x is None or x.dim() != 1 or x.shape[0] == heads:
        return x
    state = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if state is None or state._SEQUENCE_PARALLEL_GROUP is None:
        return x
    if x.shape[0] != heads * state.get_sequence_parallel_world_size():
        return x
    first = heads * state.get_sequence_parallel_rank()
    return x[first : first + heads]
