"""A run that was killed, interrupted or out of disk resumes with the same losses; a checkpoint of another run is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import engine_cases
import gloo_processes
import pytest
import torch
from training_support import ON_PATH, SCRIPTS, losses, options

from flashmla_hf.training import finetune, machine
from flashmla_hf.training.arguments import ModelArguments, TrainingArguments, UserError
from flashmla_hf.training.checkpoints import TrainerState, make_output_dir, save_checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


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


def test_results_of_an_interrupted_run_equal_those_of_an_uninterrupted_one(tiny_model, corpus, tmp_path):
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


def test_resuming_on_another_base_model_or_from_a_damaged_checkpoint_is_refused(tiny_model, corpus, tmp_path):
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
    state = checkpoint / "trainer_state.json"
    kept = state.read_text()
    for change, said in (
        ({"packs_per_step": 0}, "an earlier version"),
        ({"step": "x"}, "step: expected a count, got 'x'"),
        ({"step": True}, "step: expected a count, got True"),
        ({"step": -3}, "step: expected a count, got -3"),
        ({"runtime": None}, "runtime: expected a number of at least 0, got None"),
        ({"fingerprint": 5}, "fingerprint: expected a text, got 5"),
        ({"interval_losses": ["x"]}, "interval_losses: expected a list of numbers"),
        ({"log_history": [1]}, "log_history: expected a list of entries"),
        ({"stream": 5}, "stream: expected a place in the data, got 5"),
    ):
        state.write_text(json.dumps(json.loads(kept) | change))
        with pytest.raises(SystemExit, match=said):
            finetune.main(options(tiny_model, corpus, tmp_path / "out", **shared))
    state.write_text(kept)
    (checkpoint / "optimizer.bin").write_bytes(whole)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"oops")
    with pytest.raises(SystemExit, match=r"adapter_model\.safetensors is damaged"):
        finetune.main(options(tiny_model, corpus, tmp_path / "out", **shared))


@pytest.mark.parametrize(
    ("save_steps", "steps_before", "said"),
    [
        (0, 1, "it wrote no checkpoint, and a new run begins anew. --save_steps N writes one every N steps"),
        (3, 1, "it had written no checkpoint (--save_steps 3), and a new run begins anew"),
        (1, 2, "--resume_from_checkpoint latest continues from checkpoint-2"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    save_steps, steps_before, said, tiny_model, corpus, tmp_path, monkeypatch, capsys
):
    run_batches, calls = finetune.run_batches, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) > steps_before:
            raise KeyboardInterrupt
        return run_batches(*args)

    monkeypatch.setattr(finetune, "run_batches", interrupted)
    arguments = options(tiny_model, corpus, tmp_path / "out", max_steps=4, save_steps=save_steps)
    with pytest.raises(SystemExit) as caught:
        finetune.main(arguments)
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"finetune: interrupted; {said}"
    # What the sentence says is so: the run begins anew, or continues.
    monkeypatch.undo()
    finetune.main([*arguments, *(("--resume_from_checkpoint", "latest") if "latest" in said else ())])
    assert ("resumed from" in capsys.readouterr().out) == ("latest" in said)


def test_a_run_that_is_interrupted_in_its_last_evaluation_has_its_model(
    tiny_model, corpus, tmp_path, monkeypatch, capsys
):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "evaluate", interrupted)
    arguments = options(
        tiny_model, corpus, tmp_path / "out", max_steps=1, validation_split_percentage=10, use_peft=True
    )
    with pytest.raises(SystemExit) as caught:
        finetune.main(arguments)
    assert caught.value.code == 130
    said = f"finetune: interrupted; the trained adapter is in {tmp_path / 'out'}, without an evaluation"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_patched_run_resumes_with_the_same_losses(tiny_model, corpus, tmp_path):
    shared = {"use_peft": True, "patches": "all", "save_steps": 3, "lr_scheduler_type": "constant"}
    finetune.main(options(tiny_model, corpus, tmp_path / "whole", **shared, max_steps=6))
    finetune.main(options(tiny_model, corpus, tmp_path / "parts", **shared, max_steps=3))
    finetune.main(
        options(tiny_model, corpus, tmp_path / "parts", **shared, max_steps=6, resume_from_checkpoint="latest")
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def with_small_files(arguments: list[str], folder: Path) -> dict | str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return engine_cases.finetune("", arguments, folder)


def test_a_disk_that_fills_up_at_a_checkpoint_loses_nothing_saved(tiny_model, corpus, tmp_path):
    """Really: the system refuses files beyond a limit, which the optimizer's state is over."""
    shared = {"save_steps": 1, "lr_scheduler_type": "constant"}
    finetune.main(options(tiny_model, corpus, tmp_path, **shared, max_steps=1))
    before = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    arguments = options(tiny_model, corpus, tmp_path, **shared, max_steps=2, resume_from_checkpoint="latest")
    (told,) = gloo_processes.run(with_small_files, arguments, tmp_path, processes=1)
    assert told.startswith("finetune: checkpoint-2 could not be written"), told
    assert told.endswith("checkpoint-1 is whole: resume from it")
    assert not list(tmp_path.glob("*checkpoint-2"))
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == before
    finetune.main(arguments)
    assert len(losses(tmp_path)) == 2


def write_checkpoint(folder: Path, step: int, limit: int | None = None) -> None:
    """A checkpoint of one file that says "new", by a process alone."""
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    args = TrainingArguments(output_dir=str(folder), save_total_limit=limit)
    save_checkpoint(alone, args, TrainerState(step=step), lambda to: (to / "weights").write_text("new"))


def test_new_checkpoints_do_not_give_way_to_those_of_before_the_run_went_back(tmp_path):
    """It goes back because the last one is damaged: the new one is all that there is."""
    for step in (1, 2, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    write_checkpoint(tmp_path, 3, limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-5"}


def test_a_checkpoint_that_is_written_again_is_whole_if_removing_the_old_one_is_interrupted(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 3)
    remove = shutil.rmtree

    def interrupted(folder, **how):
        if (folder / "weights").exists() and (folder / "trainer_state.json").exists():
            (folder / "weights").unlink()
            raise KeyboardInterrupt
        remove(folder, **how)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 3)
    assert (tmp_path / "checkpoint-3" / "weights").read_text() == "new"


def test_the_newest_checkpoints_are_kept_not_those_of_the_most_steps(tmp_path):
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))  # long before the run went back to 5
    for step in (6, 9, 12):
        write_checkpoint(tmp_path, step, limit=2)
        os.utime(tmp_path / f"checkpoint-{step}", (100 + step, 100 + step))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-12", "checkpoint-20"}


def test_a_checkpoint_that_was_moved_aside_comes_back(tmp_path, monkeypatch):
    """If the new one cannot have its name; and at the start of the next run, if the process ended in between."""
    write_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "weights").write_text("old")
    rename = os.rename

    def failing(folder, name):
        if folder.name.startswith("unfinished-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(folder, name)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing)
        with pytest.raises(UserError, match=r"No space left on device.*checkpoint-3 is whole: resume from it"):
            write_checkpoint(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "weights").read_text() == "old"

    rename(tmp_path / "checkpoint-3", tmp_path / "replaced-checkpoint-3")
    shutil.copytree(tmp_path / "replaced-checkpoint-3", tmp_path / "replaced-checkpoint-2")
    (tmp_path / "checkpoint-2").mkdir()
    model = ModelArguments(model_name_or_path="elsewhere")
    make_output_dir(model, TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert (tmp_path / "checkpoint-3" / "weights").read_text() == "old"
    (tmp_path / "current").symlink_to("checkpoint-3")
    named = str(tmp_path / "current")
    make_output_dir(model, TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint=named))


def test_a_process_that_fails_leaves_the_others_files(tmp_path):
    other = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)

    def full(folder):
        (folder / "of the main process").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(other, TrainingArguments(output_dir=str(tmp_path)), TrainerState(step=3), full)
    assert (tmp_path / "unfinished-checkpoint-3" / "of the main process").exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A machine that stops would leave files of zeros otherwise: the format of weights does not tell them from whole ones."""
    on_disk, flush, rename = set(), os.fsync, os.rename

    def renamed(folder, name):
        assert {path.stat().st_ino for path in folder.rglob("*")} | {folder.stat().st_ino} <= on_disk
        rename(folder, name)

    monkeypatch.setattr(os, "fsync", lambda opened: on_disk.add(os.fstat(opened).st_ino) or flush(opened))
    monkeypatch.setattr(os, "rename", renamed)
    write_checkpoint(tmp_path, 3)
    assert (tmp_path / "checkpoint-3").is_dir()
    assert tmp_path.stat().st_ino in on_disk


def test_measuring_the_device_draws_none_of_the_runs_random_numbers():
    """A process measures once: its second run of a seed would have other dropout than the first."""
    before = torch.get_rng_state()
    assert machine._fastest_product(8, torch.float32, "cpu", least=1, limit=0.0) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_random_states_that_are_lost_are_no_checkpoint_of_a_model_with_dropout(damage, tiny_model, corpus, tmp_path):
    """accelerate goes on without them, in silence."""
    shared = {"max_steps": 2, "save_steps": 1, "use_peft": True, "lora_dropout": 0.1}
    finetune.main(options(tiny_model, corpus, tmp_path, **shared))
    states = tmp_path / "checkpoint-1" / "random_states_0.pkl"
    whole = states.read_bytes()
    states.unlink() if damage == "missing" else states.write_bytes(whole[: len(whole) // 2])
    resumed = options(tiny_model, corpus, tmp_path, **shared | {"resume_from_checkpoint": tmp_path / "checkpoint-1"})
    with pytest.raises(SystemExit, match=r"random_states_0\.pkl: expected random states; resume from an earlier one"):
        finetune.main(resumed)
