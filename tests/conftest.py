"""Settings of every test: hypothesis judges results, not how long a busy machine took; waiting threads do not spin."""

import dataclasses
import os
import sys

import pytest
from hypothesis import settings

# Read by OpenMP when torch is imported. Spinning threads make tests ten times slower where something else runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="module")
def _compilers_are_left_as_they_were():
    """A setting of torch's compilers that a file leaves behind changes what the tests of the next one compile."""
    yield
    for name in ("torch._functorch.config", "torch._dynamo.config"):
        config = sys.modules.get(name)
        if config is not None:
            changed = {
                key: value for key, value in config.get_config_copy().items() if value != config._config[key].default
            }
            assert not changed, f"{name} is left changed: {changed}"


# How often the error rule needed its second look (tests/numerics.py), in this process and in those of pytest-xdist.


def _looks():
    numerics = sys.modules.get("numerics")  # not imported: nothing was judged
    return None if numerics is None else numerics.looks


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput") and _looks() is not None:
        session.config.workeroutput["looks"] = dataclasses.astuple(_looks())


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node, error):
    if "looks" in getattr(node, "workeroutput", {}):
        import numerics

        numerics.looks = numerics.looks + numerics.Looks(*node.workeroutput["looks"])


def pytest_terminal_summary(terminalreporter):
    if _looks() is not None and _looks().calls:
        terminalreporter.write_line(str(_looks()))
