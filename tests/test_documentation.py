"""The examples and options in README.md work as they stand there."""

from __future__ import annotations

import pytest
from training_support import ROOT

from flashmla_hf.training import finetune

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_the_readmes_trainer_example_runs(tiny_model, corpus, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    code = text.split("<!-- example: trainer -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    # The example says nothing of the device: it takes a GPU where there is one, and the tiny model is float32.
    code = code.replace('report_to="none"', 'report_to="none", use_cpu=True, logging_steps=1')
    names = {"MODEL": str(tiny_model), "TEXTS": texts}
    exec(compile(code, "README.md", "exec"), names)
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert logged[-1] < logged[0]


def test_the_readmes_options_exist():
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Fine-tune") : text.index("## Examples")]
    for line in (line for line in section.splitlines() if "scripts/finetune.py" in line and "--config" in line):
        words = line.split("#")[0].split()
        arguments = words[words.index("scripts/finetune.py") + 1 :]
        finetune.parse_arguments(arguments)
    assert "--find_max_length" in section
