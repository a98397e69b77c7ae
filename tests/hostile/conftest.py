"""What no hostile file may do."""

import resource
from pathlib import Path

import pytest
from files import CANARY


@pytest.fixture(autouse=True)
def canary():
    """The file that no file may write; nor may one claim more memory than a small job has."""
    CANARY.unlink(missing_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, limits[1]))
    yield CANARY
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not CANARY.exists()
