"""The loss of held-out documents, by position: a gain from reading far back shows there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn import functional as F

from flashmla_hf.training import engines
from flashmla_hf.training.packing import NO_LOSS, Collator, Pack
from flashmla_hf.training.sequence_parallel import Share

LOGITS_BYTES = 2**28  # of the logits that evaluation holds at a time, as fp32


def token_losses(model: torch.nn.Module, inputs: dict, accelerator: Accelerator) -> torch.Tensor:
    """The loss of every token of ``inputs`` [1, tokens] but the first, fp32 [tokens - 1]; zero for labels of -100.

    The layers run once over the whole row. The rest of the model's own forward (the head, and what the model does to
    logits) runs over chunks of the layers' output, so that the logits of a long row never exist at a time.
    """
    labels = inputs.pop("labels")
    return _losses(model, inputs, F.pad(labels[0, 1:], (0, 1), value=NO_LOSS), accelerator)[:-1]


def _losses(model: torch.nn.Module, inputs: dict, labels: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The loss of every token's successor, fp32 [tokens], whose labels [tokens] are; zero for labels of -100."""
    root = accelerator.unwrap_model(model)
    model = root.get_base_model() if isinstance(root, PeftModel) else root
    tokens = len(labels)
    chunk = max(1, min(tokens, LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)))
    decoder = model.get_decoder()
    losses = torch.empty(tokens, device=labels.device)
    if decoder is model:  # the model has no decoder of its own (Llama 4's text model): all logits at a time
        with accelerator.autocast():
            logits = root(**inputs).logits[0]
        return F.cross_entropy(logits.float(), labels, reduction="none")
    is_sharded = bool(engines.engine_of(accelerator))
    chunks = math.ceil(tokens / chunk)
    if is_sharded:  # each call gathers weights: every process makes as many
        most = torch.tensor(chunks, device=accelerator.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks = int(most)
    with accelerator.autocast():
        output = _decoded(root, model, decoder, inputs) if is_sharded else decoder(**inputs)
        hidden = output.last_hidden_state  # [1, tokens, hidden]
        with _forward_restored(decoder):
            for i in range(chunks):
                rows = slice(i * chunk, min((i + 1) * chunk, tokens)) if i * chunk < tokens else slice(0, 1)
                piece = type(output)(last_hidden_state=hidden[:, rows])  # a model may read other fields of it
                decoder.forward = lambda *args, _piece=piece, **kwargs: _piece
                logits = root(input_ids=inputs["input_ids"][:, rows]).logits[0]  # [chunk, vocabulary]
                losses[rows] = F.cross_entropy(logits.float(), labels[rows], reduction="none")
    return losses


@contextlib.contextmanager
def _forward_restored(module: torch.nn.Module) -> Iterator[None]:
    """Inside it, ``module`` may get another forward; afterwards it has its own again."""
    own_forward = module.forward
    try:
        yield
    finally:
        # It was the class's method, or an instance attribute that a patch had set.
        del module.forward
        if module.forward != own_forward:
            module.forward = own_forward


def _decoded(root: torch.nn.Module, model: torch.nn.Module, decoder: torch.nn.Module, inputs: dict) -> Any:
    """The output of ``decoder`` in a call of ``root``, whose hooks gather what is sharded; the head makes one logit a token."""
    found: list[Any] = []
    head = model.get_output_embeddings()
    hook = decoder.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        with _forward_restored(head):
            head.forward = lambda hidden: hidden[..., :1]
            root(**inputs)
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    packs: list[Pack],
    collate: Collator,
    accelerator: Accelerator,
    size: int,
    share: Share | None = None,
) -> tuple[float, list[dict]]:
    """The mean loss over all predicted tokens of ``packs``, and the loss by how far back a prediction could read.

    The second is a list of a dict per power of two: ``from`` ... ``to`` tokens of the document before the predicted one,
    ``tokens`` counted, their ``loss`` and ``perplexity``.
    """
    model.eval()
    share = share or Share(accelerator.process_index, accelerator.num_processes)
    mine = packs[share.rank :: share.size]
    # Every process makes the same number of forward passes: sharded models communicate in them.
    rounds = math.ceil(math.ceil(len(packs) / share.size) / size)
    sums = torch.zeros(2, 64, device=accelerator.device, dtype=torch.float64)  # losses and tokens per power of two
    for i in range(rounds):
        batch = mine[i * size : (i + 1) * size]
        inputs = collate(batch or packs[:1], accelerator.device)
        labels, shifted = inputs.pop("labels")[0], inputs.pop("shift_labels", None)
        labels = F.pad(labels[1:], (0, 1), value=NO_LOSS) if shifted is None else shifted[0]
        losses = _losses(model, inputs, labels, accelerator)
        if batch:
            is_label = labels != NO_LOSS
            bucket = (inputs["position_ids"][0, is_label] + 1).double().log2().long()
            sums[0].index_add_(0, bucket, losses[is_label].double())
            sums[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
    model.train()
    totals, counts = accelerator.reduce(sums, "sum").tolist()
    by_position = [
        {
            "from": 2**i,
            "to": 2 ** (i + 1) - 1,
            "tokens": int(counts[i]),
            "loss": totals[i] / counts[i],
            "perplexity": perplexity(totals[i] / counts[i]),
        }
        for i in range(64)
        if counts[i]
    ]
    return sum(totals) / sum(counts), by_position


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def mean_loss(log_history: list[dict]) -> float | None:
    """The mean over steps. An entry's loss is the mean since the entry before."""
    total, counted = 0.0, 0
    for entry in (entry for entry in log_history if "loss" in entry):
        total += entry["loss"] * (entry["step"] - counted)
        counted = entry["step"]
    return total / counted if counted else None
