"""TPU kernels compiled ahead of time by libtpu, for TPUs that are not there, and what their schedules cost."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import tpu_static_cost

pytestmark = [
    pytest.mark.libtpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jaxquant[libtpu]'"
    ),
]
ROOT = Path(__file__).parents[1]
STORED = json.loads(tpu_static_cost.RESULT.read_text()) if tpu_static_cost.RESULT.exists() else {}
# Microseconds of the static schedule at 4096 x 4096 on v5e.
BARS = {
    "2x8, two bytes, 1 token": 11,
    "2x8, one byte, 1 token": 7,
    "uniform 4-bit, 1 token": 10,
    "uniform 3-bit, 1 token": 10,
    "uniform 2-bit, 1 token": 8.5,
    "16 levels per row, 1 token": 24,
}
COMPILE = """
from experiments import tpu_static_cost as cost
cost.prepare()
for name, case in cost.cases(512).items():
    cost.compile_for("{generation}", case)
    print(name)
"""
MEASURE = """
import json
from experiments import tpu_static_cost as cost
dump = cost.prepare()
for name in {names}:
    print(json.dumps([name, cost.measure("v5e", cost.cases()[name], dump)]))
"""


def run(program):
    """Runs a program in a process of its own, because the compiler reads its settings once."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("generation", tpu_static_cost.TOPOLOGIES)
def test_every_kernel_compiles(generation):
    assert run(COMPILE.format(generation=generation)) == list(tpu_static_cost.cases())


def test_schedules_are_no_longer_than_stored():
    measured = dict(map(json.loads, run(MEASURE.format(names=list(BARS)))))
    same_compiler = importlib.metadata.version("libtpu") == STORED["libtpu"]
    for name, bar in BARS.items():
        assert STORED["v5e"][name]["microseconds"] <= bar
        if same_compiler:
            assert measured[name]["cycles"] <= 1.02 * STORED["v5e"][name]["cycles"], name
            assert measured[name]["spills"] <= STORED["v5e"][name]["spills"]
