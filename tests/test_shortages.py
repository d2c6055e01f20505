"""A machine that is short of something, and data that asks for too much."""

import resource
import subprocess
import sys

import pytest

from pipeline.shortages import is_shortage


@pytest.mark.parametrize("number", [11, 12, 23, 24, 28])
def test_what_the_system_calls_a_shortage_is_one(number: int):
    assert is_shortage(OSError(number, "no"))


@pytest.mark.parametrize("error", [OSError("broken data stream"), MemoryError(), ValueError("no")])
def test_where_memory_is_to_be_had_the_data_is_to_blame(error: Exception):
    assert not is_shortage(error)


def test_where_no_memory_is_to_be_had_the_machine_is_to_blame_whatever_the_error_says():
    program = f"""
import resource
from pathlib import Path
from pipeline.shortages import is_shortage

mapped = int(Path("/proc/self/statm").read_text().split()[0]) * {resource.getpagesize()}
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**27, resource.RLIM_INFINITY))
print(is_shortage(OSError("broken data stream")))
print(is_shortage(OSError("broken data stream"), needed_bytes=2**28))
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**20, resource.RLIM_INFINITY))
print(is_shortage(MemoryError()), is_shortage(ValueError("damaged")))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split() == ["False", "True", "True", "True"], found.stderr
