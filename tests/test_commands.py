"""Every command and program has a help; the commands that a missing extra, a model or the machine's memory decides."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import demo
import gloo_processes
import measure_model
import memory_report
import pytest

from flashmla_hf.training import finetune, ledger, max_length, memory


@pytest.mark.parametrize("module", [demo, finetune, memory, ledger, memory_report, measure_model])
def test_every_program_prints_a_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


def _flashmla(capsys, *arguments):
    from flashmla_hf.__main__ import main

    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("command", ["finetune", "max-length", "memory", "ledger", "check", "doctor"])
def test_every_command_has_a_help(command, capsys):
    code, said = _flashmla(capsys, command, "--help")
    assert code == 0
    assert said.startswith(f"usage: flashmla {command}")
    assert len(said.splitlines()) > 6
    assert f"    {command}" in _flashmla(capsys)[1]


def test_an_interrupt_before_a_command_begins_is_one_sentence(monkeypatch, capsys):
    from flashmla_hf import __main__ as program

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(program.importlib, "import_module", interrupted)
    code, said = _flashmla(capsys, "finetune", "--max_length", 8)
    assert (code, said) == (130, "flashmla finetune: interrupted before it began; nothing was read or written\n")


def test_a_missing_extra_is_named_with_its_command(monkeypatch, capsys):
    from flashmla_hf import training

    found = training.importlib.util.find_spec
    monkeypatch.setattr(
        training.importlib.util, "find_spec", lambda name: None if name in ("peft", "yaml") else found(name)
    )
    code, said = _flashmla(capsys, "finetune", "--help")
    hint = 'Run: pip install "flashmla_hf[train]", or in a checkout pip install ".[train]"\n'
    assert (code, said) == (1, f"flashmla finetune: not installed: peft, yaml. {hint}")
    assert _flashmla(capsys, "ledger", "llama-8b")[0] == 0
    monkeypatch.setattr(
        training.importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    for command in ("check", "ledger"):
        assert _flashmla(capsys, command, "x") == (1, f"flashmla {command}: not installed: transformers. {hint}")


def test_the_usage_names_what_is_missing(capsys):
    assert _flashmla(capsys, "--help")[1].startswith("usage: flashmla [-h] command ...")
    code, said = _flashmla(capsys, "nurse")
    assert code == 2
    assert "argument command: invalid choice: 'nurse'" in said


def test_check_reports_a_model_without_its_weights(tiny_model, capsys):
    code, said = _flashmla(capsys, "check", tiny_model)
    assert code == 0
    assert "LlamaForCausalLM: 2 of 2 attention layers use the flashmla kernel" in said
    code, said = _flashmla(capsys, "check", "./nowhere")
    assert code == 1
    assert "'./nowhere' cannot be built" in said


def said_by_finetune(arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        finetune.main(arguments)
    return said.getvalue()


def test_memory_is_measured_beside_the_ledger(tiny_model, monkeypatch, capsys):
    """A trial is a fork here; test_max_length.py starts its process as run_trial does."""

    def limited(argv, length, timeout, *_):
        if length > 512:
            return {"length": length, "status": "out_of_memory", "reason": "finetune: out of memory"}
        (said,) = gloo_processes.run(said_by_finetune, [*argv, "--trial_length", str(length)], processes=1)
        return {"length": length, "status": "ok"} | json.loads(said.rpartition(max_length.TRIAL_MARK)[2])

    monkeypatch.setattr(memory, "run_trial", limited)
    code, said = _flashmla(
        capsys, "memory", "--model_name_or_path", tiny_model, "--use_cpu", "--tokens", 256, 1024, "--disable_tqdm"
    )
    assert code == 0, said
    assert "| 256 | " in said
    assert "| 1,024 | out of memory | " in said
    code, said = _flashmla(capsys, "memory", "--model_name_or_path", "./nowhere", "--tokens", 256)
    assert "has no loadable configuration" in str(code)
