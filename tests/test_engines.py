"""finetune on the engines of accelerate (DDP, FSDP2, DeepSpeed) gives the numbers of one process, or says why it cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import engine_cases
import gloo_processes
import pytest
from training_support import SCRIPTS, losses, options

from flashmla_hf.training import checkpoints, engines, finetune
from flashmla_hf.training.arguments import UserError, parse_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
FULL = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "patches": "all"}
LORA = {"use_peft": True, "max_grad_norm": 0.5, "patches": "all", "per_device_train_batch_size": 2}
SHARED = {"max_steps": 4, "validation_split_percentage": 20}
ENGINES = [
    pytest.param(name, marks=[] if gloo_processes.HAS_DEEPSPEED or "zero" not in name else pytest.mark.skip("no deepspeed"))
    for name in engine_cases.ENGINES
]  # fmt: skip
# Left out for their time: what they would show is shown by others.
LEFT_OUT = {("", "lora"), ("fsdp2", "lora"), ("fsdp2 offload", "lora"), ("fsdp2 whole", "full"), ("zero2", "lora")}


@pytest.fixture(scope="module")
def one_process(tiny_model, corpus, tmp_path_factory):
    """The losses and the evaluation of one process that accumulates what two would share."""
    from accelerate.state import AcceleratorState

    found = {}
    for name, given in (("full", FULL), ("lora", LORA)):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path_factory.mktemp(name)
        twice = {"gradient_accumulation_steps": 2 * given.get("gradient_accumulation_steps", 1)}
        finetune.main(options(tiny_model, corpus, folder, **SHARED | given | twice))
        found[name] = (losses(folder), json.loads((folder / "all_results.json").read_text())["eval_loss"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        pytest.param(*engine.values, kind, marks=engine.marks)
        for engine in ENGINES
        for kind in ("full", "lora")
        if (*engine.values, kind) not in LEFT_OUT
    ],
)
def test_a_resumed_run_gives_the_losses_of_one_process(engine, kind, one_process, tiny_model, corpus, tmp_path):
    """Accumulation, clipping, evaluation and a checkpoint that another launch continues from."""
    given = SHARED | {"full": FULL, "lora": LORA}[kind]
    run = engine_cases.launch(engine, tiny_model, corpus, tmp_path, resumed_at=2, **given)
    expected, eval_loss = one_process[kind]
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert run["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)
    is_whole = engine != "zero3" or kind == "lora"  # the adapters are so small that DeepSpeed partitions none of them
    assert ("mlp" in run["patches"]) == is_whole
    saved = tmp_path / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors")
    assert saved.stat().st_size > 10_000


def test_a_process_group_outlives_the_model_that_used_it(tmp_path):
    """Freed by DDP it waits for a thread of gloo that may wait for the interpreter: of 40 ends one hung in each of three tries."""
    assert gloo_processes.run(engine_cases.ended, 20, tmp_path, limit=60.0) == [20, 20]


@pytest.mark.parametrize("engine", [e for e in ENGINES if e.values[0] in ("fsdp2", "zero3")])
def test_bfloat16_trains_a_float32_adapter_on_any_engine(engine, tiny_model, corpus, tmp_path):
    given = {"max_steps": 3, "use_peft": True, "bf16": True, "patches": "all", "validation_split_percentage": 20}
    run = engine_cases.launch(engine, tiny_model, corpus, tmp_path / "two", **given)
    alone = {"gradient_accumulation_steps": 2}
    finetune.main(options(tiny_model, corpus, tmp_path / "one", **given | alone))
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


@pytest.mark.skipif(not gloo_processes.HAS_DEEPSPEED, reason="not installed: deepspeed, einops")
@pytest.mark.parametrize(("engine", "processes"), [("fsdp2", 2), ("", 4)])
def test_processes_that_share_each_sequence_give_the_losses_of_one_process(
    engine, processes, one_process, tiny_model, corpus, tmp_path
):
    """Ulysses in finetune, with a resumed run and evaluation; of four processes, two groups have packs of their own."""
    groups = processes // 2
    given = SHARED | LORA | {"sp_size": 2, "gradient_accumulation_steps": 2 // groups}
    run = engine_cases.launch(
        engine, tiny_model, corpus, tmp_path, resumed_at=2 if engine else 0, processes=processes, **given
    )
    expected, eval_loss = one_process["lora"]
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert run["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="not installed: bitsandbytes")
@pytest.mark.parametrize(("engine", "bf16", "near"), [("", False, 1e-5), ("fsdp2", False, 1e-5), ("fsdp2", True, 2e-3)])
def test_4_bit_weights_train_on_several_processes_as_on_one(engine, bf16, near, tiny_model, corpus, tmp_path):
    given = {
        "max_steps": 3,
        "use_peft": True,
        "load_in_4bit": True,
        "patches": "all",
        "validation_split_percentage": 20,
    }
    given["bf16"] = bf16
    run = engine_cases.launch(engine, tiny_model, corpus, tmp_path / "two", resumed_at=2, **given)
    finetune.main(options(tiny_model, corpus, tmp_path / "one", **given, gradient_accumulation_steps=2))
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(losses(tmp_path / "one"), rel=near)
    alone = json.loads((tmp_path / "one" / "all_results.json").read_text())
    assert run["eval_loss"] == pytest.approx(alone["eval_loss"], rel=near)


def test_4_bit_weights_and_whole_checkpoints_of_fsdp2_are_refused():
    plugin = SimpleNamespace(activation_checkpointing=False, state_dict_type=SimpleNamespace(name="FULL_STATE_DICT"))
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_fsdp2=True)
    model_args, _, args = parse_arguments(options("m", "c", "o", use_peft=True, load_in_4bit=True))
    with pytest.raises(
        UserError, match="expected fsdp_state_dict_type: SHARDED_STATE_DICT with --load_in_4bit, got FULL"
    ):
        engines._check_fsdp(accelerator, model_args, args)


# ---- another number of processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "before", "after"), [("", 2, 1), ("", 1, 2), ("fsdp2", 2, 1), ("fsdp2", 1, 2), ("fsdp2 whole", 2, 4)]
)
def test_a_run_resumes_on_another_number_of_processes(engine, before, after, one_process, tiny_model, corpus, tmp_path):
    """The order of the data, clipping and the evaluation included: the losses of a run that was not interrupted."""
    kind, given = ("lora", LORA) if after == 1 else ("full", FULL)
    whole = 2 * given.get("gradient_accumulation_steps", 1)
    given = SHARED | given | {"processes": before, "resumed_by": after, "gradient_accumulation_steps": whole // before}
    run = engine_cases.launch(engine, tiny_model, corpus, tmp_path, resumed_at=2, **given)
    expected, eval_loss = one_process[kind]
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert run["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)


@pytest.mark.skipif(not gloo_processes.HAS_DEEPSPEED, reason="not installed: deepspeed, einops")
def test_a_shared_sequence_resumes_divided_otherwise(one_process, tiny_model, corpus, tmp_path):
    """Two processes for each sequence, then one, and another batch size."""
    given = SHARED | LORA | {"sp_size": 2, "gradient_accumulation_steps": 2, "resumed_by": 1}
    given["resumed_with"] = {"sp_size": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run = engine_cases.launch("", tiny_model, corpus, tmp_path, resumed_at=2, **given)
    expected, eval_loss = one_process["lora"]
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert run["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)


def checked(saved: dict, now: dict, draws: bool = False, **given) -> None:
    _, _, args = parse_arguments(options("m", "c", "o", **given))
    states = [checkpoints.TrainerState(fingerprint="same", **state) for state in (saved, now)]
    checkpoints.check_same_run(Path("checkpoint-2"), *states, args, draws)


def test_what_would_not_continue_on_another_number_of_processes_is_refused():
    two, one = {"processes": 2, "packs_per_step": 4}, {"processes": 1, "packs_per_step": 4}
    checked(two, one)
    with pytest.raises(UserError, match=r"expected 2 processes, which wrote it, got 1: DeepSpeed.*--num_processes 2"):
        checked(two | {"engine": "deepspeed"}, one | {"engine": "deepspeed"})
    with pytest.raises(UserError, match="expected 2 processes, which wrote it, got 1: the model has dropout"):
        checked(two, one, draws=True)
    with pytest.raises(UserError, match=r"expected 4 packs in a step.*got 2 by 1 processes: --gradient_acc\w+ 4"):
        checked(two, one | {"packs_per_step": 2}, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match="got 3 by 3 processes, which no accumulation gives"):
        checked(two, {"processes": 3, "packs_per_step": 3})


def test_dropout_is_known_from_the_adapter_and_from_the_models_configuration(tiny_model, tmp_path):
    import transformers

    transformers.GPT2Config().save_pretrained(tmp_path)  # resid_pdrop 0.1
    for model, given, draws in (
        (tiny_model, {}, False), (tmp_path, {}, True), (tiny_model, {"use_peft": True, "lora_dropout": 0.1}, True),
        (tiny_model, {"lora_dropout": 0.1}, False),
    ):  # fmt: skip
        model_args, _, _ = parse_arguments(options(model, "c", "o", **given))
        assert checkpoints.draws_random_numbers(model_args) is draws, given


# ---- DeepSpeed's configuration ---------------------------------------------------------------------------------------

USUAL = {
    "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": False},
}  # fmt: skip


@pytest.mark.skipif(not gloo_processes.HAS_DEEPSPEED, reason="not installed: deepspeed, einops")
def test_a_usual_configuration_of_deepspeed_is_completed(tiny_model, corpus, tmp_path):
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps(USUAL))
    variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    given = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    run = engine_cases.launch("zero3", tiny_model, corpus, tmp_path / "two", variables=variables, **given)
    finetune.main(options(tiny_model, corpus, tmp_path / "one", **given | {"gradient_accumulation_steps": 4}))
    assert not isinstance(run, str), run
    assert run["losses"] == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def complete(config: dict, **given) -> dict:
    _, _, args = parse_arguments(options("m", "c", "o", **given))
    config = {"zero_optimization": {"stage": 2}, **config}
    plugin = SimpleNamespace(deepspeed_config=config, gradient_accumulation_steps="auto")
    state = SimpleNamespace(deepspeed_plugin=plugin)
    engines._complete_deepspeed(SimpleNamespace(state=state, num_processes=2, gradient_accumulation_steps=1), args)
    return config


def test_what_deepspeeds_configuration_leaves_open_is_the_runs():
    config = complete(USUAL | {"zero_optimization": {"stage": 3}}, gradient_accumulation_steps=4, max_grad_norm=0)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 4)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (8, 0)
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        ({"optimizer": {"type": "AdamW"}}, {}, "expected no 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "expected no 'scheduler'"),
        ({"fp16": {"enabled": True}}, {}, "expected fp16 off"),
        ({"bf16": {"enabled": True}}, {}, "add --bf16"),
        ({"bf16": {"enabled": False}}, {"bf16": True}, "remove it"),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": 0.5}, "gradient_clipping: expected 0.5 by --max_grad_norm"),
        ({"gradient_accumulation_steps": 8}, {}, "gradient_accumulation_steps: expected 1 by --gradient_acc"),
        ({"train_micro_batch_size_per_gpu": 4}, {}, "train_micro_batch_size_per_gpu: expected 1 by --per_device"),
        ({"train_batch_size": 64}, {}, "train_batch_size: expected 2 by batch size x accumulation x processes"),
    ],
    ids=str,
)
def test_a_configuration_that_says_something_else_than_the_options_is_refused(config, given, said):
    with pytest.raises(UserError, match=said):
        complete(config, **given)


@pytest.mark.parametrize("file", sorted((SCRIPTS / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_files_of_accelerate_launch_that_ship_are_read_as_they_are_meant(file, monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils import launch as environment

    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 8)
    given = launch.launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    given, _, _ = launch._validate_launch_command(given)
    given.deepspeed_fields_from_accelerate_config = ""  # launch_command fills it in
    variables = (
        environment.prepare_multi_gpu_env(given) if given.use_fsdp else environment.prepare_deepspeed_cmd_env(given)[1]
    )
    if given.use_fsdp:
        assert f"fsdp2-{given.num_processes}gpu" == file.stem
        assert (variables["ACCELERATE_USE_FSDP"], variables["FSDP_VERSION"]) == ("true", "2")
        assert variables["FSDP_ACTIVATION_CHECKPOINTING"] == "false"
    else:
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        assert (
            variables["ACCELERATE_GRADIENT_CLIPPING"] == variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
        )


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_fsdp_version_1_is_refused_before_anything_is_trained(tiny_model, corpus, tmp_path):
    told = engine_cases.launch("fsdp2", tiny_model, corpus, tmp_path, variables={"FSDP_VERSION": "1"}, max_steps=1)
    assert "expected fsdp_version: 2" in told


def test_an_engine_that_accelerate_does_not_run_here_is_refused(tiny_model, corpus, tmp_path, monkeypatch):
    """accelerate itself would train without it, in silence."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="accelerate launch asks for FSDP, and accelerate runs NO here"):
        finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1))


def test_processes_that_accelerate_does_not_join_are_refused(tiny_model, corpus, tmp_path):
    """On a CPU it joins none unless it is asked to: each process would train alone, into the same folder."""
    told = engine_cases.launch("", tiny_model, corpus, tmp_path, use_cpu=False)
    assert told.endswith("each would train by itself. Without GPUs, add --use_cpu")


def test_a_checkpoint_of_another_engine_is_refused(tiny_model, corpus, tmp_path):
    engine_cases.launch("fsdp2", tiny_model, corpus, tmp_path, max_steps=1, save_steps=1)
    assert (tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0").is_dir()
    with pytest.raises(SystemExit, match=r"expected a checkpoint of an engine that shards nothing.*got one of fsdp2"):
        finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1, resume_from_checkpoint="latest"))


# ---- processes that end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "when"), [("", "step"), ("fsdp2", "checkpoint")])
def test_a_killed_process_ends_the_others_with_one_sentence_and_the_run_resumes(
    engine, when, tiny_model, corpus, tmp_path
):
    """No launcher is there to end them: what they find out by themselves, well within a minute."""
    given = {"max_steps": 3, "save_steps": 1, "use_cpu": not engine, "gradient_accumulation_steps": 2}
    arguments = options(tiny_model, corpus, tmp_path, **given)
    with pytest.raises(gloo_processes.ProcessError) as caught:
        gloo_processes.run(engine_cases.dying, engine, arguments, tmp_path, when, limit=60)
    message, (said, _) = caught.value.args
    assert message.splitlines()[0] == "rank 1: ended without an answer"
    assert "rank 0" not in message
    assert said.startswith("finetune: process 0: ")
    kept = {"step": 2, "checkpoint": 1}[when]
    told = "another process has ended" if when == "step" else "checkpoint-1 is whole: resume from it"
    assert told in said
    assert sorted(path.name for path in tmp_path.iterdir() if "checkpoint" in path.name)[-1] == f"checkpoint-{kept}"
    resumed = [*arguments, "--resume_from_checkpoint", "latest"]
    run, _ = gloo_processes.run(engine_cases.finetune, engine, resumed, tmp_path)
    whole = engine_cases.launch("", tiny_model, corpus, tmp_path / "whole", **given | {"use_cpu": True})
    assert run["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_a_process_that_alone_runs_out_of_memory_says_so_and_ends_the_others(tiny_model, corpus, tmp_path):
    arguments = options(tiny_model, corpus, tmp_path, max_steps=4, save_steps=1)
    other, full = gloo_processes.run(engine_cases.dying, "", arguments, tmp_path, "memory", limit=60)
    assert full.startswith("finetune: process 1: out of memory; by the ledger")
    assert other.startswith("finetune: process 0: another process has ended")
    assert other.endswith("--resume_from_checkpoint latest continues from checkpoint-2")


def test_only_the_first_process_says_what_all_of_them_find(tiny_model, corpus, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(engines.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seconds in (("0", []), ("1", [engines.SAME_MISTAKE_WAIT])):
        monkeypatch.setenv("RANK", rank)
        waited.clear()
        assert engines.let_others_speak(UserError("a mistake")) == f"process {rank}: "
        assert waited == seconds
