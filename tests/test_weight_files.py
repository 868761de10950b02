"""Damaged files of weights end every command with one sentence that names the file and the way out."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from training_support import options
from transformers import AutoModelForCausalLM

from flashmla_hf import weight_files
from flashmla_hf.__main__ import main
from flashmla_hf.training import finetune

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")

DAMAGES = {  # what becomes of a file's bytes
    "cut off": lambda whole: whole[: len(whole) // 2],
    "cut off in its header": lambda whole: whole[:30],
    "empty": lambda whole: b"",
    "random": lambda whole: os.urandom(len(whole)),
    "a page of a proxy": lambda whole: b"<html>Not found</html>",
    "longer": lambda whole: whole + bytes(8),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def in_parts(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("model-*.safetensors"))[-1]


def pickled(folder):
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


KINDS = {"whole": lambda folder: folder / "model.safetensors", "parts": in_parts, "pickled": pickled}


@pytest.fixture
def model(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_named(how, kind, model):
    file = KINDS[kind](model)
    assert weight_files.damage(model) is None
    if kind == "pickled" and how == "longer":
        return  # an archive with bytes behind it is read
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    said = weight_files.damage(model)
    assert said.startswith(f"{file} is damaged: expected ")
    assert said.endswith(". Copy or download this file again")


def test_an_index_and_a_pointer_of_git_lfs_are_named(model):
    in_parts(model)
    index = model / "model.safetensors.index.json"
    for damaged in ("", "{}", "[1]", '{"weight_map": {"a": 3}}', '{"weight_map": '):
        index.write_text(damaged)
        assert weight_files.damage(model).startswith(f"{index} is damaged: expected an index of weights. ")
    (model / "model.safetensors").write_bytes(POINTER)
    said = weight_files.damage(model)
    assert said.endswith("it is a pointer of Git LFS in place of the file. Run git lfs pull in its folder")


def test_files_that_are_not_read_do_not_matter(model):
    """Transformers reads model.safetensors, whatever lies beside it."""
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "consolidated.safetensors"):
        (model / name).write_bytes(b"oops")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    assert weight_files.damage(model) is None
    assert weight_files.damage("./nowhere") is None
    assert weight_files.damage("nobody/nothing") is None


def test_a_damaged_download_is_named_with_its_way_out(model, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(model / file))
    assert weight_files.damage("some/model") is None
    (model / "model.safetensors").write_bytes(b"oops")
    assert weight_files.damage("some/model").endswith(
        ". Remove it, and it is downloaded again (hf download some/model)"
    )


@pytest.mark.parametrize("how", ["cut off", "random"])
@pytest.mark.parametrize("command", ["finetune", "max-length", "memory", "check"])
def test_every_command_says_so_in_one_sentence(command, how, model, corpus, tmp_path, capsys):
    file = model / "model.safetensors"
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    argv = {
        "check": [str(model)],
        "memory": ["--model_name_or_path", str(model), "--use_cpu", "--tokens", "64", "--disable_tqdm"],
    }.get(command) or options(model, corpus, tmp_path / "out", max_steps=1)
    try:
        code = main([command, *argv])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err + (code if isinstance(code, str) else "")
    assert code not in (0, None)
    assert f"{file} is damaged: expected a safetensors file of" in said
    assert said.rstrip().endswith("Copy or download this file again")
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("use_peft", [False, True])
def test_damaged_weights_of_a_checkpoint_are_named(use_peft, tiny_model, corpus, tmp_path):
    shared = {"max_steps": 1, "save_steps": 1, "use_peft": use_peft, "resume_from_checkpoint": "latest"}
    finetune.main(options(tiny_model, corpus, tmp_path, **shared))
    file = tmp_path / "checkpoint-1" / ("adapter_model.safetensors" if use_peft else "model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SystemExit, match=f"{file} is damaged: .* Copy or download") as caught:
        finetune.main(options(tiny_model, corpus, tmp_path, **shared))
    assert "\n" not in str(caught.value)
