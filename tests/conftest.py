"""What several test files share."""
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from ledger import WRITE, Ledger

# the same examples every time, however busy the machine is
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    "The parity ledger; written anew at the end where WRITE_LEDGER is set."
    ledger = Ledger()
    yield ledger
    if WRITE:
        ledger.write()
