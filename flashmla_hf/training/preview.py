"""A packed sequence as text, with the tokens that have a loss marked: what a run trains on, seen before it trains."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from flashmla_hf.training.packing import Pack, loss_tokens, token_ids

OPEN, CLOSE = "⟦", "⟧"
SHORT_PART = 120  # characters of a part that a short preview shows, half of them at either end
SHORT_PARTS = 8


def preview(pack: Pack, tokenizer: PreTrainedTokenizerBase, is_short: bool) -> str:
    """The pack as lines of text: documents one after another, what has a loss between ⟦ and ⟧."""
    tokens, trained = sum(map(len, pack)), sum(map(loss_tokens, pack))
    pieces = f"{len(pack)} {'piece' if len(pack) == 1 else 'pieces'} of documents"
    # The first token of each piece cannot have a loss.
    whole = trained == tokens - len(pack)
    marks = "all of it is trained on" if whole else f"{trained:,} trained on, between {OPEN} and {CLOSE}"
    lines = [f"first packed sequence: {pieces}, {tokens:,} tokens; {marks}"]
    left = SHORT_PARTS if is_short else None
    for number, piece in enumerate(pack, start=1):
        parts = _parts(piece, tokenizer)
        if left is not None and left < len(parts):
            parts = parts[:left]
        if not parts:
            lines.append(f"  ... and {len(pack) - number + 1} more pieces; --preview shows all of it, and ends")
            break
        left = left if left is None else left - len(parts)
        shown = [
            f"{OPEN}{text}{CLOSE}" if has_loss and not whole else text
            for text, has_loss in ((_shortened(text) if is_short else text, has_loss) for text, has_loss in parts)
        ]
        lines += [f"  | {line}" for line in "".join(shown).split("\n")]
        if number < len(pack):
            lines.append("  |---")
    return "\n".join(lines)


def _parts(piece: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The piece as runs of text that have a loss or have none."""
    runs = [[int(i) for i in run] for _, run in groupby(range(len(piece)), key=lambda i: piece[i] >= 0)]
    ids = token_ids(piece)
    return [(_printable(tokenizer.decode(ids[run].tolist())), bool(piece[run[0]] >= 0)) for run in runs]


def _shortened(text: str) -> str:
    if len(text) <= SHORT_PART:
        return text
    half = SHORT_PART // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def _printable(text: str) -> str:
    """Control characters as their escapes: a document must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
