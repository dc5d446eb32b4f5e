"""Feast without its rewriting of sources, which takes most of its import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import environment

COUNT = """
import sys
from typeguard import _decorators
made = []
real = _decorators.instrument
def instrument(function):
    made.append(function.__module__)
    return real(function)
_decorators.instrument = instrument
"""

PROGRAMS = {
    "luigi": "sys.argv = ['/bin/luigi']; import batch, batch.steps",
    "faust": "sys.argv = ['/bin/faust']; import streaming\ntry:\n    streaming.app\nexcept Exception:\n    pass",
    "another": "import batch, feast",
}
TOLD = "\nprint('feast' in sys.modules, 'feast.entity' in made)"


@pytest.mark.parametrize(("program", "is_checked"), [("luigi", False), ("faust", False), ("another", True)])
def test_only_processes_of_ours_leave_feast_unchecked(program: str, is_checked: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT + PROGRAMS[program] + TOLD],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-2:] == ["True", str(is_checked)]


def test_a_worker_keeps_its_metrics_in_memory(tmp_path: Path) -> None:
    """Whatever whoever started it has set, or imported: Feast sets it for its own servers, of many processes."""
    told = "\nfrom prometheus_client import values\nprint(values.ValueClass.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{PROGRAMS['faust']}{told}"],
        env={**environment(), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "MutexValue"
    assert not list(tmp_path.iterdir())


def test_what_others_check_is_still_checked(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "from typeguard import typechecked\n@typechecked\ndef length(text: str) -> int:\n    return len(text)\n",
        encoding="utf-8",
    )
    program = """
from headrace.quick_import import leave_feast_unchecked
leave_feast_unchecked()
leave_feast_unchecked()
import other, typeguard
try:
    other.length([])
except typeguard.TypeCheckError as error:
    print(error)
"""
    variables = environment()
    variables["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert "is not an instance of str" in done.stdout
