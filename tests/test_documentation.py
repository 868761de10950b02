"""The examples and commands of docs/ work as they stand there."""

from __future__ import annotations

import pytest
from training_support import ROOT

from flashmla_hf.training import finetune

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_the_trainer_example_of_the_documentation_runs(tiny_model, corpus, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "transformers.md").read_text()
    code = text.split("<!-- example: trainer -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    # The example does not name a device: it takes a GPU if there is one, and the tiny model is float32.
    code = code.replace('report_to="none"', 'report_to="none", use_cpu=True, logging_steps=1')
    names = {"MODEL": str(tiny_model), "TEXTS": texts}
    exec(compile(code, "transformers.md", "exec"), names)
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert logged[-1] < logged[0]


def test_the_options_of_the_documented_commands_exist():
    text = (ROOT / "docs" / "finetune.md").read_text()
    commands = [line.split() for line in text.splitlines() if "--config scripts/configs/" in line]
    assert len(commands) == 5
    text = (ROOT / "docs" / "distributed.md").read_text()
    commands += [line.split() for line in text.splitlines() if "--config scripts/configs/" in line]
    assert len(commands) == 7
    for words in commands:
        finetune.parse_arguments(words[words.index("--config") :])
