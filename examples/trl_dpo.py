"""Direct preference optimisation with TRL: pairs of a chosen and a rejected answer.

    python examples/trl_dpo.py --model_name_or_path Qwen/Qwen3-0.6B --max_length 8192 --output_dir out
    python examples/trl_dpo.py --model_name_or_path Qwen/Qwen3-8B --max_length 32768 --use_peft --output_dir out

TRL loads the reference model with the same attention. With --use_peft there is none: it is the model without its adapter.
Every option of TRL's DPOConfig and ModelConfig is an option here.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config

import flashmla_hf


@dataclass
class ExampleArguments:
    dataset: str = field(
        default="trl-lib/ultrafeedback_binarized", metadata={"help": "A dataset of the Hub, or a .jsonl file."}
    )
    no_patches: bool = field(default=False, metadata={"help": "Leave the memory patches out."})


def main() -> None:
    parser = TrlParser((ExampleArguments, DPOConfig, ModelConfig))
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
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
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
