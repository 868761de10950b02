"""One measured point of a model in a fork, for tests of what is done with the measurement."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import asdict

import gloo_processes
import measure_model
from measure_model import Measurement, Point


def run_program(point: Point) -> str:
    """What the program says of ``point``, in a process that it may end."""
    sys.argv = [measure_model.__file__, json.dumps(asdict(point))]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        measure_model.main()
    return said.getvalue()


def in_fork(point: Point, timeout: float) -> Measurement:
    """As ``measure_model.in_subprocess``, in a process that need not import everything again."""
    (said,) = gloo_processes.run(run_program, point, processes=1, limit=timeout)
    return Measurement(**json.loads(said.rpartition(measure_model.RESULT_MARK)[2]) | {"point": point})
