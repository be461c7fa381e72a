"""Tests of several processes: ``ranks`` runs a function on them."""

import pytest
from processes import Ranks


@pytest.fixture(scope="session")
def processes():
    """The processes of all tests."""
    pytest.importorskip("torch.distributed.tensor")
    processes = Ranks()
    yield processes
    processes.kill()


@pytest.fixture
def ranks(processes, tmp_path):
    """``ranks(2, function, ...)`` runs it on two ranks and returns what they return."""
    return lambda world_size, *call, **kwargs: processes.run(world_size, tmp_path, *call, **kwargs)


@pytest.fixture(params=[2, 4], ids="{}_ranks".format)
def world_size(request):
    """Number of ranks."""
    return request.param
