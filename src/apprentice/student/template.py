"""The chat template, the same wherever the student is shown a chat: in training, in play, on vLLM, by others."""

from pathlib import Path

import trl

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3_vl.jinja").read_text()
"""Qwen3-VL's own. TRL knows by this very text how to read a model's calls: any other, and its own training variant too,
its `environment_factory` and its trainers with tools refuse. Which tokens are the answer is known without marks."""
