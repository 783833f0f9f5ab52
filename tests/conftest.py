"""What several test files share."""
from collections.abc import Iterator

import pytest
from ledger import WRITE, Ledger


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    "The parity ledger; written anew at the end where WRITE_LEDGER is set."
    ledger = Ledger()
    yield ledger
    if WRITE:
        ledger.write()
