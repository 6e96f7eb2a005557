"""The names of TRL that are not public and that training/rl.py rests on: what they were in 1.16, when it was written.

A newer TRL that moves one fails here, and says which, before a run goes wrong.
"""

import inspect
import re
from importlib.metadata import version

import pytest
from trl import GRPOTrainer

from apprentice.fingerprint import PACKAGE

SIGNATURES = {
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
}
SOURCES = {
    "__init__": ["self._metrics = ", "self._step = 0"],
    "training_step": ["super().training_step(model, inputs, num_items_in_batch)"],
    "_compute_loss": [
        'inputs["advantages"]',
        "advantages.dim() == 1",
        'inputs.get("old_per_token_logps")',
        'inputs["ref_per_token_logps"]',
        '"num_items_in_batch"',
    ],
    "log": ["self._metrics[mode]"],
}
MOVED = f"TRL {version('trl')} has changed it since 1.16: read its release notes, and training/rl.py"


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_private_method_takes_what_it_took(name):
    found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert found[: len(SIGNATURES[name])] == SIGNATURES[name], f"GRPOTrainer.{name}: {MOVED}"


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in SOURCES.items() for line in lines])
def test_a_method_does_what_it_did(name, line):
    assert line in inspect.getsource(getattr(GRPOTrainer, name)), f"GRPOTrainer.{name}: {MOVED}"


def test_no_other_file_uses_a_private_name_of_trl():
    names = re.compile(
        r"\b(_prepare_inputs|_compute_loss|_get_per_token_logps_and_entropies|_metrics|_buffered_inputs)\b"
    )
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if names.search(path.read_text())}
    assert users == {"training/rl.py", "training/sft.py"}  # the latter calls transformers' own _prepare_inputs
