"""Token ids -> pieces of at most ``max_length`` -> packs of pieces -> batches without padding.

DataCollatorWithFlattening lays a batch of packs end to end and marks where each piece begins (``position_ids``,
``cu_seq_lens_*``): no token attends to another document.

A token that is read and has no loss (a prompt, a user's message) is stored as the complement of its id, ``~id``, which is
negative: cutting and packing cannot part a token from its mark.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import DataCollatorWithFlattening

Pack = list[np.ndarray]  # pieces of documents, int32 [piece_length] each, together at most max_length tokens
NO_LOSS = -100  # the label of a token without a loss


def marked(ids: list[int], trained: np.ndarray | None = None) -> np.ndarray:
    """Ids as they are packed, int32 [length]: complements where ``trained``, bool [length], is false. None: all trained."""
    array = np.array(ids, dtype=np.int32)
    return array if trained is None else np.where(trained, array, ~array)


def token_ids(piece: np.ndarray) -> np.ndarray:
    """The token ids of a packed piece, [length]."""
    return np.where(piece < 0, ~piece, piece)


def loss_tokens(piece: np.ndarray) -> int:
    """How many tokens of the piece have a loss. The first has none: nothing is read before it."""
    return int(np.count_nonzero(piece[1:] >= 0))


def pack(documents: list[np.ndarray], max_length: int) -> list[Pack]:
    """Cuts documents into pieces of at most ``max_length`` tokens and packs the pieces, best fit decreasing.

    Source: Ding et al. 2024, arXiv 2404.10830 (TRL's packing strategy "bfd"): nothing is cut that fits whole.
    """
    pieces = [ids[start : start + max_length] for ids in documents for start in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if loss_tokens(piece)]  # a single token, or a prompt, predicts nothing
    pieces.sort(key=len, reverse=True)  # stable: the order is a function of the data alone
    packs: list[Pack] = []
    with_room: dict[int, list[int]] = {}  # tokens still free -> packs with that much room
    for piece in pieces:
        rooms = [room for room in with_room if room >= len(piece)]
        if rooms:
            room = min(rooms)
            index = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
            packs[index].append(piece)
        else:
            room, index = max_length, len(packs)
            packs.append([piece])
        if room - len(piece) > 1:
            with_room.setdefault(room - len(piece), []).append(index)
    return packs


def spread(packs: list[Pack], count: int | None) -> list[Pack]:
    """``count`` of the packs (``None``: all), from the whole list: it is sorted by the longest piece."""
    if count is None or count >= len(packs):
        return packs
    return [packs[i] for i in np.linspace(0, len(packs) - 1, count, dtype=int)]


def predicted_tokens(packs: list[Pack]) -> int:
    """How many tokens have a loss."""
    return sum(loss_tokens(piece) for one in packs for piece in one)


def largest_id(packs: list[Pack]) -> int:
    return max(int(token_ids(piece).max()) for one in packs for piece in one)


class Collator:
    """Packs -> one row [1, tokens] of input_ids, labels, position_ids, and cu_seq_lens_* for flash-style attention.

    ``cut`` takes this process's part out of the row (sequence_parallel.Share.cut).
    """

    def __init__(self, attn_implementation: str, cut: Callable[[dict], dict] | None = None):
        is_flash = "flash" in attn_implementation  # Transformers' own test of which backends read cu_seq_lens_*
        self.cut = cut
        self.flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=is_flash)

    def __call__(self, packs: list[Pack], device: torch.device) -> dict:
        features = [
            {"input_ids": token_ids(piece), "labels": np.where(piece < 0, NO_LOSS, piece)} for one in packs for piece in one
        ]  # fmt: skip
        batch = self.flatten(features)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        # A cache is of no use here, and with one Transformers would not see where packed documents begin.
        batch |= {"use_cache": False}
        return batch if self.cut is None else self.cut(batch)
