"""Fine-tuning with Transformers' Trainer: documents laid end to end, none of which sees another.

    python examples/transformers_trainer.py --model_name_or_path Qwen/Qwen3-0.6B --max_length 32768 --bf16
    python examples/transformers_trainer.py --model_name_or_path Qwen/Qwen3-8B --use_peft --max_length 131072 --bf16

Every option of TrainingArguments is an option here. --attn_implementation sdpa --no_patches is the same run without this
package.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import flashmla_hf


@dataclass
class ExampleArguments:
    model_name_or_path: str = field(metadata={"help": "A model of the Hub, or a folder."})
    dataset: str = field(
        default="emozilla/pg19-test", metadata={"help": "A dataset of the Hub with a column text, or a .jsonl file."}
    )
    max_length: int = field(default=8192, metadata={"help": "Documents are cut to so many tokens."})
    attn_implementation: str = field(default="flashmla", metadata={"help": "The attention."})
    no_patches: bool = field(default=False, metadata={"help": "Leave the memory patches out."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    example_args, training_args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(example_args.model_name_or_path)
    if example_args.dataset.endswith(".jsonl"):
        documents = load_dataset("json", data_files=example_args.dataset, split="train")
    else:
        documents = load_dataset(example_args.dataset, split="train")
    tokens = documents.map(
        lambda row: {"input_ids": tokenizer(row["text"])["input_ids"][: example_args.max_length]},
        remove_columns=documents.column_names,
    )

    model = AutoModelForCausalLM.from_pretrained(
        example_args.model_name_or_path,
        dtype=torch.bfloat16 if example_args.use_peft and training_args.bf16 else torch.float32,
        attn_implementation=example_args.attn_implementation,
    )
    if example_args.use_peft:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    if not example_args.no_patches:
        flashmla_hf.patch(model)  # "checkpointing" is one of them: leave --gradient_checkpointing off
        print(flashmla_hf.patch_report(model))

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=tokens,
        processing_class=tokenizer,
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
