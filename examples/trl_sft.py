"""Supervised fine-tuning with TRL on long chats: packed, or padding-free, loss on all tokens or on the assistant's alone.

    python examples/trl_sft.py --model_name_or_path Qwen/Qwen3-0.6B --packing --max_length 32768 --output_dir out
    python examples/trl_sft.py --model_name_or_path Qwen/Qwen3-0.6B --padding_free --assistant_only_loss --output_dir out
    python examples/trl_sft.py --model_name_or_path Qwen/Qwen3-8B --packing --max_length 131072 --use_peft --output_dir out

Every option of TRL's SFTConfig and ModelConfig is an option here. --attn_implementation sdpa --no_patches is the same run
without this package.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import flashmla_hf


@dataclass
class ExampleArguments:
    dataset: str = field(default="trl-lib/Capybara", metadata={"help": "A dataset of the Hub, or a .jsonl file."})
    no_patches: bool = field(default=False, metadata={"help": "Leave the memory patches out."})


def main() -> None:
    parser = TrlParser((ExampleArguments, SFTConfig, ModelConfig))
    parser.set_defaults(attn_implementation="flashmla", dtype="bfloat16", lora_target_modules=["all-linear"])
    parser.set_defaults(gradient_checkpointing=False)  # one of the patches does it
    if not torch.cuda.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)
    example_args, training_args, model_args = parser.parse_args_and_config()

    if example_args.dataset.endswith(".jsonl"):
        dataset = load_dataset("json", data_files=example_args.dataset, split="train")
    else:
        dataset = load_dataset(example_args.dataset, split="train")

    training_args.model_init_kwargs = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if training_args.padding_free and not training_args.packing:
        training_args.max_length = None  # TRL does not cut texts that it does not pack
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )
    if not example_args.no_patches:
        flashmla_hf.patch(trainer.model, exclude=["loss"])  # TRL computes the loss itself, without storing logits
        print(flashmla_hf.patch_report(trainer.model))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
