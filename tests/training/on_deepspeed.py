"""DeepSpeed for real, on two CPU processes: `make test-deepspeed`."""

import torch
from test_rl import TWO_CORES, adapted, run_and_last_adapter

__all__ = ["adapted"]  # a fixture


@TWO_CORES
def test_two_ranks_of_zero_make_the_update_of_one_process_without(adapted, tmp_path):
    one = run_and_last_adapter(tmp_path / "1", adapted, 1, {})
    two = run_and_last_adapter(tmp_path / "2", adapted, 2, {"profiles.tiny.rl.zero": {"stage": 2}})
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0)
