"""For all tests: machine constants are those that are shipped, whatever this machine was measured to be."""

import pytest

from gnsfx.kernels import machine

_READ = machine.read


@pytest.fixture(autouse=True, scope="session")
def shipped_constants():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "read", lambda device_type: None)
        machine.machine_for.cache_clear()
        yield
    machine.machine_for.cache_clear()


@pytest.fixture
def real_read():
    """What reads the constants of this machine, for tests of that."""
    return _READ
