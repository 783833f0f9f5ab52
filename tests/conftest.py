"""What several test files share."""
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from ledger import WRITE, Ledger

# the same examples every time, however busy the machine is
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

LONG = ["test_train", "test_resume", "test_parity", "test_export", "test_distributed"]  # the workers begin with these
# what another machine's instructions, threads, workers or older libraries could change: `make test-machines`
SENSITIVE = {"test_parity", "test_parity_masks", "test_parity_transforms", "test_evaluation", "test_batching"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Mark what `make test-machines` runs, and put the files first that take longest."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.path.stem in SENSITIVE or "two_processes" in item.name:
            item.add_marker(pytest.mark.machines)


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    "The parity ledger; written anew at the end where WRITE_LEDGER is set."
    ledger = Ledger()
    yield ledger
    if WRITE:
        ledger.write()
