"""accelerate launch and torchrun as a user calls them: a killed process ends the run, which resumes; one mistake is said once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_support import ON_PATH, SCRIPTS, losses, options

from flashmla_hf.training import finetune

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
PROGRAM = ["-m", "flashmla_hf.training.finetune"]
WITHIN = 60  # seconds: of the other processes, after one was killed


def start(launcher: list[str], arguments: list[str], said: Path) -> subprocess.Popen:
    env = ON_PATH | {"OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        return subprocess.Popen([*LAUNCH, *launcher, *PROGRAM, *arguments], env=env, stdout=file, stderr=file)


def process_of(launcher: int, rank: int) -> int:
    """The id of the process of ``rank`` among the launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text().replace("LOCAL_RANK", ""):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def sentences(said: Path) -> list[str]:
    return [line for line in said.read_text().splitlines() if line.startswith("finetune: ")]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_process_killed_under_accelerate_launch_ends_the_run_which_resumes_on_one(tiny_model, corpus, tmp_path):
    given = {"max_steps": 12, "save_steps": 2, "learning_rate": 1e-3, "use_peft": True}
    arguments = options(tiny_model, corpus, tmp_path / "out", **given)
    launcher = start(["--multi_gpu", "--num_processes", "2"], arguments, tmp_path / "said")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-2").is_dir():
        assert launcher.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process_of(launcher.pid, 1), signal.SIGKILL)
    assert launcher.wait(WITHIN) != 0
    told = (tmp_path / "said").read_text()
    assert "Signal 9 (SIGKILL)" in told
    assert len(sentences(tmp_path / "said")) <= 1
    assert not (tmp_path / "out" / "all_results.json").exists()

    resumed = {"resume_from_checkpoint": "latest", "gradient_accumulation_steps": 2}
    finetune.main(options(tiny_model, corpus, tmp_path / "out", **given | resumed))
    finetune.main(options(tiny_model, corpus, tmp_path / "whole", **given | {"gradient_accumulation_steps": 2}))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["processes"] == 1


def test_the_file_of_fsdp2_without_gpus_is_refused_in_one_sentence(tiny_model, corpus, tmp_path):
    """accelerate itself would run without FSDP, every process by itself."""
    file = SCRIPTS / "accelerate" / "fsdp2-2gpu.yaml"
    arguments = options(tiny_model, corpus, tmp_path / "out", use_cpu=False)
    launcher = start(["--config_file", str(file)], arguments, tmp_path / "said")
    assert launcher.wait(120) != 0
    (told,) = sentences(tmp_path / "said")
    assert told.startswith("finetune: process 0: accelerate launch asks for FSDP, and accelerate runs NO here")


def test_processes_that_accelerate_launch_does_not_start_are_missed(tiny_model, corpus, tmp_path, monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    given = launch.launch_command_parser().parse_args(["--cpu", "--num_processes", "2", "train.py"])
    _, variables = prepare_simple_launcher_cmd_env(launch._validate_launch_command(given)[0])
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.setenv(name, variables[name])
    with pytest.raises(
        SystemExit, match=r"expected the processes of --num_processes, got one.*torchrun --nproc_per_node"
    ):
        finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1))
