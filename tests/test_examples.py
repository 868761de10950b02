"""examples/ run as a user runs them, on a tiny model: their losses are those of eager attention without memory patches.

Each run is a process of its own; those that are compared are forked from one that has imported the libraries, which takes
longer than two steps do. A test is skipped if the library of its example is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
WITHOUT_US = ("--attn_implementation", "eager", "--no_patches")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<end>"
    "{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
)


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"not installed: {package}")


def words(count: int, seed: int) -> str:
    return " ".join(("alpha", "beta", "gamma", "delta", "epsilon")[(seed + i * i) % 5] for i in range(count))


ROWS = {
    "chats": lambda i: {
        "messages": [
            {"role": "user", "content": words(4 + i % 3, i)},
            {"role": "assistant", "content": words(5 + 3 * (i % 4), i + 1)},
        ]
    },
    "preferences": lambda i: {
        "prompt": words(4 + i % 3, i),
        "chosen": " " + words(6 + i % 4, i + 1),
        "rejected": " " + words(5 + i % 3, i + 2),
    },
    "prompts": lambda i: {"prompt": words(4 + i % 3, i)},
    "texts": lambda i: {"text": words(10 + 7 * (i % 4), i)},
    "pairs": lambda i: {"query": words(4 + i % 3, i), "answer": words(10 + 7 * (i % 4), i + i // 4)},
    "choices": lambda i: {"text": words(3 + i, i), "label": i % 2, "choices": [" alpha", " beta gamma"]},
}


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a token for padding, and with a chat template that marks what the assistant says."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<end>"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(16)))
    return tmp_path


def environment_of(folder: Path) -> dict[str, str]:
    """Ours for a run in ``folder``: this checkout, no network, one thread."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hub")}
    return os.environ | ours


def check(exit_code: int, stdout: str, stderr: str) -> None:
    """Fails if a run failed, or warned of anything that names us."""
    assert exit_code == 0, f"exit code {exit_code}\n{stdout[-2000:]}\n{stderr[-4000:]}"
    said = [line for line in stderr.splitlines() if " INFO " not in line]
    ours = [line for line in said if re.search(r"flashmla|flash.?att", line, re.IGNORECASE)]
    assert not ours, f"warnings that name us:\n{ours}"


def run(folder: Path, *command: str | Path) -> None:
    """Runs Python with ``command`` in ``folder``."""
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment_of(folder), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    check(result.returncode, result.stdout, result.stderr)


# Imports what the examples import, and not this package. For each line, [folder, script and arguments], it runs the script in
# a fork, its words in stdout.txt and stderr.txt of the folder, and answers with the exit code.
FORKING = """
import importlib.util, json, os, runpy, signal, sys, traceback
import torch, datasets, peft
from transformers import Trainer
if importlib.util.find_spec("trl"):
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer
if importlib.util.find_spec("sentence_transformers"):
    from sentence_transformers import SentenceTransformerTrainer
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(200)
        os.chdir(folder)
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, sys.path[0], code = arguments, os.path.dirname(arguments[0]), 1
        try:
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """``forked(folder, script, *arguments)`` is :func:`run` in a fork."""
    environment = environment_of(tmp_path_factory.mktemp("forking"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKING], env=environment, **pipes) as server:

        def call(folder: Path, *command: str | Path) -> None:
            print(json.dumps([str(folder), [*map(str, command)]]), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, "the process that forks has ended"
            check(int(answer), *((folder / name).read_text() for name in ("stdout.txt", "stderr.txt")))

        yield call
        server.stdin.close()


def log_of(forked, script: str, folder: Path, model: Path, *options: str) -> list[dict[str, float]]:
    """What two steps of an example log."""
    output = folder / ("eager" if "eager" in options else "flashmla")
    forked(
        folder, EXAMPLES / script, "--model_name_or_path", model, "--output_dir", output, "--max_steps", "2",
        "--logging_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu",
        "--learning_rate", "1e-2", "--disable_tqdm", "True", *options,
    )  # fmt: skip
    assert list(output.glob("*.safetensors")), "no model was saved"
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_same(
    forked, script: str, folder: Path, model: Path, options: tuple[str, ...], names=("loss", "grad_norm")
) -> None:
    ours = log_of(forked, script, folder, model, *options)
    eager = log_of(forked, script, folder, model, *options, *WITHOUT_US)
    assert len(ours) == len(eager) == 2
    for name in names:
        expected = [entry[name] for entry in eager]
        assert all(expected), f"{name} says nothing: {expected}"
        assert [entry[name] for entry in ours] == pytest.approx(expected, rel=1e-3), name


IN_FLOAT32 = ("--dtype", "float32", "--bf16", "False")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--packing", "--max_length", "64"), ("--padding_free", "--assistant_only_loss")],
    ids=lambda o: o[0][2:],
)
def test_trl_sft(options, data, model, forked):
    needs("trl")
    assert_same(forked, "trl_sft.py", data, model, ("--dataset", "chats.jsonl", *IN_FLOAT32, *options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "dataset", "options"),
    [("trl_sft.py", "chats", ("--packing", "--max_length", "64")), ("transformers_trainer.py", "texts", ("--bf16",))],
)
def test_without_a_gpu_an_example_needs_no_option_for_it(script, dataset, options, data, model, forked):
    """The command of the page, without ``--use_cpu``: Transformers refuses bf16 on a machine without a GPU otherwise."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    start = forked
    if script.startswith("trl"):
        needs("trl")
        start = run  # one example in a process of its own
    start(
        data, EXAMPLES / script, "--model_name_or_path", model, "--dataset", f"{dataset}.jsonl", "--output_dir", "out",
        "--max_steps", "1", "--report_to", "none", *options,
    )  # fmt: skip
    assert list((data / "out").glob("*.safetensors"))


@pytest.mark.slow
def test_trl_dpo(data, model, forked):
    needs("trl")
    assert_same(forked, "trl_dpo.py", data, model, ("--dataset", "preferences.jsonl", *IN_FLOAT32))


@pytest.mark.slow
def test_trl_grpo(data, model, forked):
    """Its loss is zero in the first step after each generation, by definition; its gradient is not."""
    needs("trl")
    options = ("--dataset", "prompts.jsonl", *IN_FLOAT32, "--num_generations", "2", "--max_completion_length", "8")
    assert_same(forked, "trl_grpo.py", data, model, options, names=("grad_norm", "reward", "entropy"))


@pytest.mark.slow
def test_transformers_trainer(data, model, forked):
    assert_same(forked, "transformers_trainer.py", data, model, ("--dataset", "texts.jsonl"))


@pytest.mark.slow
def test_embedding_model(data, model, forked):
    needs("sentence_transformers")
    assert_same(forked, "embedding_model.py", data, model, ("--dataset", "pairs.jsonl"))


TASKS = {
    "tiny_choice": {
        "file": "choices.jsonl", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "brier_score"}],
    },
    "tiny_text": {
        "file": "texts.jsonl", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}  # fmt: skip


@pytest.mark.slow
def test_the_lm_eval_command_of_the_page(data, model):
    needs("lm_eval")
    page = (EXAMPLES / "README.md").read_text()
    command = re.search(
        r"^lm_eval (run --model hf --model_args pretrained=)MODEL(,attn_implementation=flashmla) ", page, re.M
    )
    assert command, "examples/README.md: expected the command of lm_eval"
    (data / "tasks").mkdir()
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data / task["file"])}}}
        rest = {key: value for key, value in task.items() if key != "file"}
        (data / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **files, **rest}))
    found = {}
    for attention in ("flashmla", "eager"):
        start = f"{command[1]}{model}{command[2]}".replace("=flashmla", f"={attention}")
        run(
            data, "-m", "lm_eval", *start.split(), "--device", "cpu", "--include_path", data / "tasks", "--tasks",
            ",".join(TASKS), "--output_path", data / f"{attention}.json",
        )  # fmt: skip
        (results,) = data.glob(f"**/{attention}_*.json")
        results = json.loads(results.read_text())["results"]
        found[attention] = [
            results["tiny_choice"]["brier_score,none"],
            results["tiny_text"]["bits_per_byte,none"],
        ]
    assert found["flashmla"] == pytest.approx(found["eager"], rel=1e-5)


def test_the_axolotl_plugin_adds_our_name_and_patches(tiny_model, monkeypatch):
    """With stand-ins for the two modules that it imports: Axolotl pins another Transformers."""
    from transformers import AutoModelForCausalLM

    import flashmla_hf

    base, schema = types.ModuleType("axolotl.integrations.base"), types.ModuleType("axolotl.utils.schemas.config")
    base.BasePlugin = object
    schema.CANONICAL_ATTN_IMPLS = schema.ATTN_IMPLS_SUPPORTING_PACKING = frozenset({"sdpa"})
    names = ("axolotl", "axolotl.integrations", "axolotl.utils", "axolotl.utils.schemas")
    modules = {name: types.ModuleType(name) for name in names} | {base.__name__: base, schema.__name__: schema}
    modules["axolotl.utils.schemas"].config = schema
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plugin = importlib.import_module("axolotl_plugin").FlashMLAPlugin()
    plugin.register({})
    assert "flashmla" in schema.CANONICAL_ATTN_IMPLS & schema.ATTN_IMPLS_SUPPORTING_PACKING
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="flashmla")
    plugin.post_model_load({}, model)
    assert "mlp" in flashmla_hf.patch_report(model).applied


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short_and_in_the_table(script):
    assert len((EXAMPLES / script).read_text().splitlines()) <= 80
    assert f"`{script}`" in (EXAMPLES / "README.md").read_text()
