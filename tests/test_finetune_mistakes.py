"""A mistake in the options, the files or the model, and running out of memory or disk, end finetune with one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from training_support import SCRIPTS, options
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
)

from flashmla_hf.training import arguments, checkpoints, finetune, machine, memory

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

MISTAKES = {  # name: (changed options, file contents to write, what the sentence says)
    "no such file": ({"train_file": "nowhere.txt"}, {}, "nowhere.txt: no such file or folder"),
    "no such model": ({"model_name_or_path": "./nowhere"}, {}, "model ./nowhere: no such folder"),
    "too short": ({"train_file": "a.txt"}, {"a.txt": "hello"}, "too short: 6 tokens, fewer than one sequence"),
    "too few for a step": (
        {"gradient_accumulation_steps": 1000},
        {},
        "one optimizer step takes 1000",
    ),
    "empty": ({"train_file": "a.txt"}, {"a.txt": "  \n"}, "holds no text"),
    "not text": ({"train_file": "a.txt"}, {"a.txt": b"\xff\xfe\x00"}, "not text: byte 0 is not UTF-8"),
    "bad json": ({"train_file": "a.jsonl"}, {"a.jsonl": '{"text": "x"}\n{oops'}, "line 2: not a JSON object"),
    "number of too many digits": (
        {"train_file": "a.jsonl"},
        {"a.jsonl": '{"text": "x", "n": ' + "1" * 5000 + "}"},
        "line 1: not a JSON object: Exceeds the limit",
    ),
    "array with such a number": ({"train_file": "a.json"}, {"a.json": f"[{'1' * 5000}]"}, "not a readable JSON array"),
    "data named by its text": ({"train_file": "word " * 100}, {}, "cannot be read: File name too long"),
    "model of too long a name": ({"model_name_or_path": "m" * 300}, {}, "File name too long"),
    "checkpoint of too long a name": ({"resume_from_checkpoint": "c" * 300}, {}, "File name too long"),
    "missing column": (
        {"train_file": "a.jsonl"},
        {"a.jsonl": '{"body": "x"}'},
        "line 1: no column 'text', only ['body']",
    ),
    "column of numbers": ({"train_file": "a.jsonl"}, {"a.jsonl": '{"text": 3}'}, "line 1: expected text, got int"),
    "bad parquet": ({"train_file": "a.parquet"}, {"a.parquet": "x"}, "is not a readable parquet file"),
    "one document to split": (
        {"train_file": "a.txt", "validation_split_percentage": 10},
        {"a.txt": "word " * 500},
        "a single document, which cannot be split",
    ),
    "no checkpoint": ({"resume_from_checkpoint": "nowhere"}, {}, "no checkpoint there"),
    "unknown option in YAML": ({"config": "c.yaml"}, {"c.yaml": "lr: 1"}, "unknown option 'lr'"),
    "mistyped option in YAML": (
        {"config": "c.yaml"},
        {"c.yaml": "max_lenght: 3"},
        "c.yaml: unknown option 'max_lenght'; did you mean 'max_length'? --help lists the options",
    ),
    "bad YAML": ({"config": "c.yaml"}, {"c.yaml": "a: [1"}, "--config c.yaml cannot be read"),
    "wrong module": (
        {"use_peft": True, "lora_target_modules": "nothing_proj"},
        {},
        "--lora_target_modules nothing_proj",
    ),
    "endless rate": ({"learning_rate": float("inf")}, {}, "--learning_rate: expected at least 0, and finite, got inf"),
    "zero batch": ({"per_device_train_batch_size": 0}, {}, "expected at least 1, got 0"),
    "bad schedule": ({"lr_scheduler_type": "zigzag"}, {}, "--lr_scheduler_type zigzag"),
    "schedule of measures": (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {},
        "--lr_scheduler_type reduce_lr_on_plateau",
    ),
    "negative rate": ({"learning_rate": -1}, {}, "--learning_rate: expected at least 0, got -1.0"),
    "no number": ({"learning_rate": "nan"}, {}, "--learning_rate: expected at least 0, and finite, got nan"),
    "seed too large": ({"seed": 2**33}, {}, "--seed: expected 0 to"),
    "no epochs": ({"num_train_epochs": 0, "max_steps": -1}, {}, "--num_train_epochs: expected more than 0"),
    "keep -1 checkpoints": ({"save_total_limit": -1}, {}, "--save_total_limit: expected at least 1, got -1"),
    "rank 0": ({"use_peft": True, "lora_r": 0}, {}, "--lora_r: expected at least 1, got 0"),
    "scale 0": ({"use_peft": True, "lora_alpha": 0}, {}, "--lora_alpha: expected 1 to"),
    "a scale beyond all floats": ({"use_peft": True, "lora_alpha": "9" * 400}, {}, "--lora_alpha: expected 1 to"),
    "a length beyond all floats": ({"max_length": "9" * 400}, {}, "--max_length: expected at least 2, and finite"),
    "empty name": ({"train_file": ""}, {}, "--train_file: expected a name"),
    "test split of files": (
        {"dataset_test_split": "test"},
        {},
        "--dataset_test_split: expected it with --dataset_name",
    ),
    "half a pair": (
        {"train_file": "a.jsonl"},
        {"a.jsonl": r'{"text": "\ud800"}'},
        "line 1: character 0 is half of a pair",
    ),
    "YAML of another type": ({"config": "c.yaml"}, {"c.yaml": "seed: 3.7"}, "c.yaml: seed: expected int, got 3.7"),
    "YAML of no choice": ({"config": "c.yaml"}, {"c.yaml": "dtype: float16"}, "dtype: expected one of auto, float32"),
    "YAML of nothing": ({"config": "c.yaml"}, {"c.yaml": "max_length:"}, "max_length: expected a value, got none"),
    "YAML list": ({"config": "c.yaml"}, {"c.yaml": "seed: [1]"}, "seed: expected one value, got [1]"),
    "YAML of no truth": ({"config": "c.yaml"}, {"c.yaml": "use_peft: maybe"}, "c.yaml: use_peft: "),
    "YAML of bytes": ({"config": "c.yaml"}, {"c.yaml": b"seed: \xff"}, "--config c.yaml cannot be read"),
    "an adapter as model": ({"model_name_or_path": "a"}, {"a/adapter_config.json": "{}"}, "model a is an adapter"),
    "not our checkpoint": (
        {"resume_from_checkpoint": "c"},
        {"c/trainer_state.json": '{"global_step": 5}', "c/optimizer.bin": "x"},
        "trainer_state.json is not of flashmla finetune",
    ),
    "results of another kind": ({}, {"out/adapter_config.json": "{}"}, "holds an adapter of an earlier run"),
    "earlier checkpoints": (
        {},
        {"out/checkpoint-3/optimizer.bin": "x"},
        "holds checkpoint-3 of an earlier run: continue",
    ),
    "a checkpoint of elsewhere beside other ones": (
        {"resume_from_checkpoint": "other/checkpoint-1"},
        {"out/checkpoint-3/optimizer.bin": "x"},
        "holds checkpoint-3 of an earlier run: continue",
    ),
    "the model's folder as output": (
        {"model_name_or_path": "out"},
        {"out/config.json": "{}"},
        "is the folder of --model_name_or_path, whose weights",
    ),
    "output within the data": (
        {"train_file": "."},
        {"a.txt": "x"},
        "lies in --train_file ., of which every file is data",
    ),
    "output within held-out data": ({"validation_file": "out"}, {"out/a.txt": "x"}, "lies in --validation_file out"),
    "a table in a folder": (
        {"train_file": "data"},
        {"data/a.txt": "x", "data/b.csv": "text\nx"},
        "got a table that would be read as one text. Convert it",
    ),
    "a table": (
        {"train_file": "a.csv"},
        {"a.csv": "text\nx"},
        "got a table that would be read as one text. Convert it",
    ),
    "learning rate too high": (
        {"learning_rate": 1e30, "max_steps": 8, "max_grad_norm": 0},
        {},
        "begin anew with a lower --learning_rate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_sentence(mistake, tiny_model, corpus, tmp_path, monkeypatch):
    changed, files, sentence = MISTAKES[mistake]
    if mistake == "bad parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as caught:
        finetune.main(options(tiny_model, corpus, tmp_path / "out", **{"max_steps": 1, **changed}))
    message = str(caught.value)
    assert message.startswith("finetune: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_lenght", "3"], "unknown option '--max_lenght'; did you mean '--max_length'? --help lists the options"),
        (["--max-lenght=3"], "unknown option '--max-lenght'; did you mean '--max-length'? --help lists the options"),
        (["--model", "m"], "unknown option '--model'; did you mean '--model_name_or_path'? --help lists the options"),
        (["--zzz"], "unknown option '--zzz'; --help lists the options"),
        (["stray"], "unexpected argument 'stray'; --help lists the options"),
    ],
)
def test_a_word_that_is_no_option_ends_as_argparse_ends(words, said, tiny_model, corpus, tmp_path, capsys):
    for argv in ([*options(tiny_model, corpus, tmp_path), *words], words):
        if argv == ["stray"]:
            continue  # argparse names the options that are missing
        with pytest.raises(SystemExit) as caught:
            finetune.main(argv)
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"finetune: {said}\n"
    with pytest.raises(SystemExit) as caught:
        memory.main(["--tokens", "8", *options(tiny_model, corpus, tmp_path), *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"flashmla memory: {said}\n"


def test_logs_go_to_tensorboard_only_if_it_is_installed(monkeypatch):
    required = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
    for is_installed in (True, False):
        monkeypatch.setattr(arguments, "has_tensorboard", lambda is_installed=is_installed: is_installed)
        assert finetune.parse_arguments(required)[2].logs_to_tensorboard is is_installed
        assert not finetune.parse_arguments([*required, "--report_to", "none"])[2].logs_to_tensorboard
    with pytest.raises(arguments.UserError, match="--report_to tensorboard: not installed: tensorboard"):
        finetune.parse_arguments([*required, "--report_to", "tensorboard"])


def test_the_yaml_file_sets_options_and_the_command_line_wins(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model_name_or_path: m\noutput_dir: o\ntrain_file: t\nlearning_rate: 3e-4\nlora_target_modules: [a, b]\n"
    )
    model_args, _, args = finetune.parse_arguments(["--config", str(config), "--output_dir", "other"])
    assert (args.learning_rate, args.output_dir, model_args.lora_target_modules) == (3e-4, "other", ["a", "b"])


def test_yaml_values_are_read_as_the_command_line_reads_them(tmp_path):
    config = tmp_path / "c.yaml"
    required = {"model_name_or_path": "m", "train_file": "~/t", "output_dir": "o"}
    config.write_text(
        "\n".join([*(f"{k}: {v}" for k, v in required.items()), "patches: loss", "lora_target_modules: q_proj"])
    )
    model_args, data_args, _ = finetune.parse_arguments(["--config", str(config)])
    assert (model_args.patches, model_args.lora_target_modules) == (["loss"], ["q_proj"])
    assert data_args.train_file == str(Path("~/t").expanduser())
    with pytest.raises(ValueError, match="--conf"):  # no abbreviation: the file would not be read
        finetune.parse_arguments(["--conf", str(config), *options("m", "t", "o")])


def test_out_of_memory_is_what_torch_says_and_nothing_that_sounds_like_it():
    with pytest.raises(RuntimeError) as torchs_own:
        torch.empty(2**45)
    assert machine.is_out_of_memory(torchs_own.value)
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert machine.is_out_of_memory(MemoryError())
    for text in (  # NCCL's, Triton's, the driver's and cuBLAS's
        "Last error:\nCuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes", "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
    ):  # fmt: skip
        assert machine.is_out_of_memory(RuntimeError(text)), text
    for text in (
        "Expected tensor allocated on cuda:0", "not enough memory of the past", "cannot allocate a name", "memory format"
    ):  # fmt: skip
        assert not machine.is_out_of_memory(RuntimeError(text))


def test_a_place_that_cannot_be_written_shows_at_once(tiny_model, corpus, tmp_path, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", read_only)
    for more in ({"max_steps": 1}, {"find_max_length": True}):
        with pytest.raises(SystemExit, match="out cannot be written to: Read-only file system"):
            finetune.main(options(tiny_model, corpus, tmp_path / "out", **more))


def test_tokens_beyond_the_embedding_are_refused(tiny_model, corpus, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "small")
    with pytest.raises(SystemExit, match=r"gives token .*, and the model embeds 60"):
        finetune.main(options(tmp_path / "small", corpus, tmp_path / "out", max_steps=1))


def test_the_configs_that_ship_are_valid():
    for config in (SCRIPTS / "configs").glob("*.yaml"):
        required = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
        finetune.parse_arguments(["--config", str(config), *required])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory; by the ledger .* add loss|out of memory; by the",
        ),
        (MemoryError(), "out of memory; by the ledger"),
        (OSError(28, "No space left on device"), "No space left on device; make room; it wrote no checkpoint"),
        (
            RuntimeError("flashmla_hf.patch: patch 'offload': host memory: expected more"),
            "patch 'offload': host memory",
        ),
        (ValueError("flashmla_hf.patch: patch 'mlp': expected\na tensor"), "patch 'mlp': expected a tensor"),
    ],
)
def test_running_out_ends_with_one_sentence(error, said, tiny_model, corpus, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(finetune, "run_batches", fail)
    with pytest.raises(SystemExit, match=said) as caught:
        finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        (["nothing"], "unknown patch 'nothing': expected auto, all, light, none, some of loss"),
        (["offload=many"], "expected a number after offload="),
        (["offload"], "needs patch 'checkpointing'"),
        (
            ["mla_decode"],
            "mla_decode: expected a patch for training, got one for decoding, which changes no step of it. Leave",
        ),
        (["all", "mla_decode"], "mla_decode: expected a patch for training, got one for decoding"),
    ],
)
def test_a_wrong_patch_ends_with_one_sentence(patches, said, tiny_model, corpus, tmp_path):
    with pytest.raises(SystemExit) as caught:
        finetune.main([*options(tiny_model, corpus, tmp_path / "out", max_steps=1), "--patches", *patches])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _bert(folder):
    config = BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=304
    )
    BertForMaskedLM(config).save_pretrained(folder)


def _reward_model(folder):
    config = AutoConfig.from_pretrained(folder, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)


OTHER_MODELS = {  # what becomes of a folder with the tiny model: (change, options, what the sentence says)
    "an encoder": (
        _bert,
        {},
        "(BertLMHeadModel) is an encoder, whose tokens see the ones after them: expected a causal",
    ),
    "a reward model": (
        _reward_model,
        {},
        "has no weights for lm_head.weight, and would begin with random ones: expected a causal language model, got the "
        "weights of LlamaForSequenceClassification",
    ),
    "float16": (
        lambda folder: AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(folder),
        {"dtype": "auto"},
        "is saved in float16, whose small gradients vanish: give --dtype bfloat16 or float32",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), {}, "got one without config.json"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("token*")],
        {},
        "has no loadable tokenizer: Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library",
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_model_that_would_not_be_trained_as_meant_is_refused(name, tiny_model, corpus, tmp_path):
    change, more, said = OTHER_MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    change(model)
    with pytest.raises(SystemExit) as caught:
        finetune.main(options(model, corpus, tmp_path / "out", max_steps=1, **more))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "float16":  # the way out that the sentence names
        finetune.main(options(model, corpus, tmp_path / "out", max_steps=1, dtype="bfloat16"))


def test_a_missing_option_is_named_in_a_few_lines(capsys):
    with pytest.raises(SystemExit) as caught:
        finetune.main(["--model_name_or_path", "m"])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert "the following arguments are required: --output_dir" in said[-1]
    assert len(said) <= 3
