"""Fine-tune a causal language model on long documents, with attention by flashmla.

    python scripts/finetune.py --config scripts/configs/lora.yaml --train_file notes/ --output_dir results/notes
    accelerate launch scripts/finetune.py --config scripts/configs/lora.yaml --train_file notes/ --output_dir results/notes
    python scripts/finetune.py --config scripts/configs/lora.yaml ... --resume_from_checkpoint latest
    flashmla max-length --config scripts/configs/lora-long.yaml ...
    tensorboard --logdir results/notes/runs

This is the run of ``flashmla finetune`` and of ``accelerate launch -m flashmla_hf.training.finetune``. Its stages are
functions of the package, to be read in this order:

    arguments.parse_arguments      defaults, then --config YAML, then the command line
    data.prepare_data              rows -> documents -> tokens -> pieces of at most max_length -> packs of pieces
    finetune.prepare_model         weights, adapter, memory patches, optimizer, schedule
    finetune.resume                weights, states and the place in the data, from a checkpoint
    finetune.train_steps           the loop
    finetune.finish                the saved adapter or model, its held-out loss by position, all_results.json
"""

from flashmla_hf.training.finetune import main

if __name__ == "__main__":
    main()
