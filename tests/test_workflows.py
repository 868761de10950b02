"""The public workflows and .ci/run: YAML that parses, and targets that the Makefile has."""

import re
import shlex

import pytest
from build_support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def targets():
    text = (ROOT / "Makefile").read_text()
    return {name for line in re.findall(r"^([a-z][\w .-]*):(?!=)", text, re.M) for name in line.split()}


def asked_for(command):
    """Targets of the `make` commands of a shell text, those of .ci/run that it times too; settings are no targets."""
    for line in command.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|&&|;|\btimed|\bnice -n 19)\s*make\s+([^#&;|>]*)", line)
        yield from (word for word in (shlex.split(found[1]) if found else ()) if "=" not in word)


@pytest.mark.parametrize("path", [*WORKFLOWS, *TEMPLATES], ids=lambda path: path.name)
def test_the_file_is_yaml(path):
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_asks_for_targets_that_exist(path):
    yaml = pytest.importorskip("yaml")
    for name, job in yaml.safe_load(path.read_text())["jobs"].items():
        assert job.get("timeout-minutes") or name == "publish", f"{name} has no time limit"
        listed = job.get("strategy", {}).get("matrix", {}).get("target", [])
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        wanted = set(asked_for(commands.replace("${{ matrix.target }}", " ".join(listed))))
        assert wanted <= targets(), f"{name}: {sorted(wanted - targets())}"


def test_ci_asks_for_targets_that_exist():
    wanted = set(asked_for((ROOT / ".ci" / "run").read_text()))
    assert {"lint", "types", "docs", "cuda-objects", "cuda", "test"} <= wanted <= targets()
