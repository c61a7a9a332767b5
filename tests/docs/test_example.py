"""The whole idea in one file runs, and says what it should."""

import re
import subprocess
import sys

from pipeline.core.provenance import ROOT

EXAMPLE = ROOT / "docs/example.py"


def test_the_example_distils():
    result = subprocess.run(
        [sys.executable, EXAMPLE], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    accuracy = {name: float(value) for name, value in re.findall(r"^(\w+): ([\d.]+)", result.stdout, re.MULTILINE)}
    assert re.search(r"on the boundary: (9\d|100)\.\d%", result.stdout)
    assert accuracy["teacher"] > 94
    # Between labels and logits lie many standard errors; between logits and boundary samples only a few.
    assert accuracy["hinton"] > accuracy["original"] + 2
    assert accuracy["bss"] > accuracy["original"] + 2


def test_the_example_is_short_and_uses_the_door_only():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 80
    assert "from pipeline" not in text
