"""Tokens that another program or an older policy has drawn count by the ratio of trainer to sampler."""

from types import SimpleNamespace

import pytest
import torch

from apprentice.params import Evaluation, Rl
from apprentice.training.rl import RlTrainer

SAMPLED = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.5], [0.5, 0.1]]))
OWN = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.6, 0.9]]))
MASK = torch.tensor([[1, 1], [1, 1], [1, 0]])  # the last reply has one token


def corrected(mode: str) -> dict:
    settings = Rl(
        seeds="0-9",
        evaluation=Evaluation(seeds="10"),
        iterations=1,
        groups=1,
        group_size=2,
        max_steps=60,
        decisions=64,
        importance_sampling=mode,
    )
    trainer = SimpleNamespace(rl=settings, _logprobs_under=lambda adapter, rows: OWN)
    rows = {"old_per_token_logps": SAMPLED, "completion_mask": MASK, "advantages": torch.tensor([1.0, 1.0, -2.0])}
    return RlTrainer._corrected(trainer, rows)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[1, 0.5], [3, 1], [-2.4, -2]]),
        ("token_mask", [[1, 0.5], [0, 1], [-2.4, -2]]),
        ("sequence_truncate", [[0.5, 0.5], [3, 3], [-2.4, -2.4]]),
        ("sequence_mask", [[0.5, 0.5], [0, 0], [-2.4, -2.4]]),
    ],
)
def test_advantages_are_weighed_within_bounds(mode, expected):
    torch.testing.assert_close(corrected(mode)["advantages"], torch.tensor(expected, dtype=torch.float32))


def test_the_loss_clips_against_the_trainers_own_probabilities():
    found = corrected("sequence_mask")
    assert found["old_per_token_logps"] is OWN and found["sampling_per_token_logps"] is SAMPLED
