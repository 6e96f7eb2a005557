"""The chat template, the same wherever the student is shown a chat: in training, in play, on vLLM."""

from pathlib import Path

import trl

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3_vl_training.jinja").read_text()
"""TRL's training variant of Qwen3-VL's chat template: the same text, and it knows which tokens are the answer."""
