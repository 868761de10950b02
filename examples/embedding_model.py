"""An embedding model with sentence-transformers: trained on pairs that belong together, then asked which texts are alike.

    python examples/embedding_model.py --model_name_or_path Qwen/Qwen3-Embedding-0.6B --bf16 --output_dir out

The texts of a batch are laid end to end, without padding, as sentence-transformers does for every flash attention. Every option
of SentenceTransformerTrainingArguments is an option here.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import HfArgumentParser

import flashmla_hf


@dataclass
class ExampleArguments:
    model_name_or_path: str = field(metadata={"help": "A model of the Hub, or a folder."})
    dataset: str = field(
        default="sentence-transformers/natural-questions",
        metadata={"help": "A dataset of the Hub with two columns of text, or a .jsonl file."},
    )
    max_length: int = field(default=8192, metadata={"help": "Texts are cut to so many tokens."})
    attn_implementation: str = field(default="flashmla", metadata={"help": "The attention."})
    no_patches: bool = field(default=False, metadata={"help": "Leave the memory patches out."})


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, SentenceTransformerTrainingArguments))
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    example_args, training_args = parser.parse_args_into_dataclasses()
    if example_args.dataset.endswith(".jsonl"):
        pairs = load_dataset("json", data_files=example_args.dataset, split="train")
    else:
        pairs = load_dataset(example_args.dataset, split="train")

    model = SentenceTransformer(
        example_args.model_name_or_path,
        model_kwargs={"attn_implementation": example_args.attn_implementation},
    )
    model.max_seq_length = example_args.max_length
    if not example_args.no_patches:
        flashmla_hf.patch(model[0].model, exclude=["loss"])  # the Transformers model inside has no language-model loss
        print(flashmla_hf.patch_report(model[0].model))

    trainer = SentenceTransformerTrainer(
        model=model, args=training_args, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    trainer.save_model()

    query, answer = pairs[0].values()
    print("similarity:", model.similarity(model.encode([query]), model.encode([answer])).item())


if __name__ == "__main__":
    main()
