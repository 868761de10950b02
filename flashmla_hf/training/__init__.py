"""Fine-tuning on long documents, and the arithmetic of its memory: the modules behind the command ``flashmla``.

    finetune     one training run: the loop, and the stages around it
    arguments    its options                     data         rows -> documents -> tokens -> packs, by the next six:
    rows         reads files and datasets        formats      what the columns of a row mean
    encoding     tokens, and which have a loss   packing      tokens -> packs -> batches
    stream       packs as training goes on       preview      the first pack as text
    model        the model and its adapter       step         the batches of one optimizer step, forward and backward
    evaluation   the loss of held-out documents  checkpoints  saving, and resuming
    engines      DDP, FSDP2 and DeepSpeed: what each needs beside the loop
    sequence_parallel  several processes for each sequence
    max_length   the longest context that fits   memory       a step's measured memory beside the ledger's
    quantization base weights in 4 bits
    ledger       a step's memory, by arithmetic  shape        a model's sizes and operations
    machine      the device: its memory and speed

Importing ``flashmla_hf`` imports nothing of this. ``ledger`` and ``shape`` need torch and Transformers alone; everything
else needs the extra: ``pip install "flashmla_hf[train]"``.
"""

from __future__ import annotations

import importlib.util

EXTRA = 'pip install "flashmla_hf[train]", or in a checkout pip install ".[train]"'
# The modules that the extra brings.
_MODULES = ("transformers", "accelerate", "peft", "datasets", "yaml", "tqdm")


def missing_packages() -> list[str]:
    """The modules of the extra ``train`` that are not installed here."""
    return [name for name in _MODULES if importlib.util.find_spec(name) is None]
