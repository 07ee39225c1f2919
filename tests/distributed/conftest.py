from __future__ import annotations

import pytest

from tests.distributed.processes import Processes


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """`started(ranks)`: that many processes, the same ones for all tests."""
    pools: dict[int, Processes] = {}

    def start(ranks: int) -> Processes:
        if ranks in pools and pools[ranks].broken:
            pools.pop(ranks).stop()
        if ranks not in pools:
            pools[ranks] = Processes(ranks, str(tmp_path_factory.mktemp("store") / "file"))
        return pools[ranks]

    yield start
    for pool in pools.values():
        pool.stop()


@pytest.fixture(params=[2, 4], ids=["2-ranks", "4-ranks"])
def processes(request, started):
    return started(request.param)
