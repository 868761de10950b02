"""Reinforcement learning with TRL's GRPO: the model answers prompts, a function rewards the answers.

    python examples/trl_grpo.py --model_name_or_path Qwen/Qwen3-0.6B --max_completion_length 2048 --output_dir out
    python examples/trl_grpo.py --model_name_or_path Qwen/Qwen3-0.6B --use_transformers_continuous_batching --output_dir out

Generation and training use the same attention. Every option of TRL's GRPOConfig and ModelConfig is an option here.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

import flashmla_hf


@dataclass
class ExampleArguments:
    dataset: str = field(
        default="trl-lib/tldr", metadata={"help": "A dataset of the Hub with a column prompt, or a .jsonl file."}
    )
    no_patches: bool = field(default=False, metadata={"help": "Leave the memory patches out."})


def reward_different_characters(completions: list, **columns) -> list[float]:
    """Replace this by what your answers are worth: one number for each of them."""
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [float(len(set(text))) for text in texts]


def main() -> None:
    parser = TrlParser((ExampleArguments, GRPOConfig, ModelConfig))
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
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_different_characters,
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )
    if not example_args.no_patches:
        flashmla_hf.patch(
            trainer.model, exclude=["loss"]
        )  # TRL computes log-probabilities itself, without storing logits
        print(flashmla_hf.patch_report(trainer.model))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
