"""The harness itself: it reports ranks that fail, die or hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import Ranks


def sum_of_ranks(start):
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def fails_on_rank_1():
    assert dist.get_rank() != 1, "this one"
    dist.barrier()


def dies_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def hangs():
    time.sleep(1000)


@pytest.mark.exhaustive
def test_ranks_that_fail_die_or_hang_are_reported(tmp_path):
    ranks = Ranks(timeout=60)
    try:
        assert ranks.run(2, tmp_path, sum_of_ranks, 10) == [21, 21]
        with pytest.raises(AssertionError, match=r"ranks \[1\]: Traceback(.|\n)*this one"):
            ranks.run(2, tmp_path, fails_on_rank_1)
        assert ranks.run(2, tmp_path, sum_of_ranks, 20) == [41, 41]
        with pytest.raises(AssertionError, match=r"ranks \[0\]: died with exit code 7"):
            ranks.run(2, tmp_path, dies_on_rank_0)
        assert ranks.run(1, tmp_path, sum_of_ranks, 5) == [5]
        ranks.timeout = 0.5
        with pytest.raises(
            AssertionError, match=r"ranks \[0\]: killed; it did not end within 0\.5 s"
        ):
            ranks.run(1, tmp_path, hangs)
    finally:
        ranks.kill()
