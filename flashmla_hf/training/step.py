"""One optimizer step: which batches each process runs in it, and their forward and backward.

The loss of a step is the sum over its tokens that have one, divided by their number, over all accumulated batches and all
processes: packs of different length, or another ``gradient_accumulation_steps``, do not change what is optimised.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from flashmla_hf.training import engines
from flashmla_hf.training.arguments import TrainingArguments
from flashmla_hf.training.packing import Collator, Pack, predicted_tokens
from flashmla_hf.training.sequence_parallel import Share, packs_per_step
from flashmla_hf.training.stream import PackStream


class StepBatches(NamedTuple):
    """One optimizer step: the batches of this process, and what all processes read in it."""

    batches: list[list[Pack]]
    loss_tokens: int  # that have a loss
    tokens: int  # that have one or could have had one: all but the first of each piece


def step_batches(
    packs: list[Pack] | PackStream, step: int, accelerator: Accelerator, args: TrainingArguments
) -> StepBatches:
    """The batches of optimizer step ``step``.

    Of a list, a function of the step alone, so that resuming needs no replay. Every epoch is one permutation of the packs.
    Packs at its end that do not fill a whole step are left out of that epoch. Of a stream, the packs that follow.
    """
    size, share = args.per_device_train_batch_size, Share.of(accelerator, args)
    per_step = packs_per_step(accelerator, args)
    if isinstance(packs, PackStream):
        chosen = packs.take(per_step)
    else:
        epoch, index = divmod(step, len(packs) // per_step)
        order = np.random.default_rng((args.seed, epoch)).permutation(len(packs))
        chosen = [packs[i] for i in order[index * per_step : (index + 1) * per_step]]
    mine = chosen[share.rank :: share.size]
    tokens = sum(len(piece) - 1 for one in chosen for piece in one)
    return StepBatches([mine[i : i + size] for i in range(0, len(mine), size)], predicted_tokens(chosen), tokens)


def run_batches(
    model: torch.nn.Module, batches: list[list[Pack]], num_items: int, collate: Collator, accelerator: Accelerator
) -> torch.Tensor:
    """Forward and backward of one step's batches; returns this process's share of the step's loss."""
    step_loss = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        with engines.accumulating(accelerator, model, is_last=i == len(batches) - 1):
            loss = model(**collate(batch, accelerator.device), num_items_in_batch=num_items).loss
            step_loss += loss.detach()
            engines.backward(accelerator, loss)
    return step_loss
