"""Command lines of finetune on the tiny model and corpus of conftest.py, and the losses that a run wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
ON_PATH = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


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
