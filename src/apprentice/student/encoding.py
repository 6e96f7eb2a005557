"""Chats as the token ids and pixels that a model is given: the one way for training, playing and RL."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from apprentice import prompt
from apprentice.world import png

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLProcessor


def _pngs(messages: list[dict]) -> list[bytes]:
    urls = [
        part["image_url"]["url"]
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls]


def pictures(messages: list[dict]) -> list[np.ndarray]:
    """The pictures of OpenAI chat messages, decoded: uint8 (height, width, 3) each."""
    return [png.decode(data) for data in _pngs(messages)]


@dataclass(frozen=True)
class Encoded:
    """A conversation as a model is given it."""

    prompt_ids: list[int]
    """Everything up to where the assistant begins, one id for each visual token."""
    answer_ids: list[int]
    """What the assistant says, with the token that ends it; empty where it is still to be said."""
    pixel_values: torch.Tensor | None
    """float32, (patches, channels × temporal patch × patch × patch)."""
    image_grid_thw: torch.Tensor | None
    """int64, (pictures, 3): patches in time, height and width."""


def length(processor: "Qwen3VLProcessor", messages: list[dict]) -> int:
    """How many tokens `encode` would give for an answered chat; its pictures are opened only to see their size.

    Raises ValueError where `encode` would, but for a picture whose pixels cannot be decoded.
    """
    return lengths(processor, messages)[0]


def lengths(processor: "Qwen3VLProcessor", messages: list[dict]) -> tuple[int, int]:
    """`length`, and how many of these tokens are the answer's."""
    images, sizes = processor.image_processor, [png.size(data) for data in _pngs(messages)]
    patches = sum(images.get_number_of_image_patches(height, width) for width, height in sizes)
    before, answer = _rendered(processor, messages)
    ids = _ids(processor.tokenizer, [before + answer])[0]
    _count_pictures(processor, ids, len(sizes))
    said = len(_kept_ids(processor.tokenizer, answer)) if answer else 0
    return len(ids) - len(sizes) + patches // images.merge_size**2, said


def _count_pictures(processor: "Qwen3VLProcessor", ids: list[int], pictures: int) -> None:
    """Raise ValueError unless a chat has as many pictures as places for them."""
    if (places := ids.count(processor.image_token_id)) != pictures:
        raise ValueError(f"the chat has {pictures} pictures and {places} places for them in its user's turns")


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of rendered chats, one for each picture."""
    # A special token is cut out before anything else, so what stands before the first end of turn can be kept: it's
    # the system prompt with the tools, most of the text and the same in every row.
    parts = [text.partition(tokenizer.eos_token) for text in texts]
    rests = tokenizer([rest for _, _, rest in parts], add_special_tokens=False)["input_ids"]
    return [[*_kept_ids(tokenizer, first + end), *rest] for (first, end, _), rest in zip(parts, rests, strict=True)]


@lru_cache(maxsize=256)
def _kept_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


_PLACE = "\ue000"


def _rendered(processor: "Qwen3VLProcessor", chat: list[dict]) -> tuple[str, str]:
    """A chat by the chat template, up to where the last assistant message begins, and that message.

    Of a chat's words only the last of its user's change from one decision to the next, and the template copies those as
    they are: chats that differ in nothing else are rendered once.
    """
    chat = prompt.plain(chat)
    turn = next((place for place in reversed(range(len(chat))) if chat[place]["role"] == "user"), None)
    content = chat[turn]["content"] if turn is not None else None
    words = [part["text"] for part in content if part["type"] == "text"] if isinstance(content, list) else []
    if len(words) == 1:
        parts = [part | {"text": _PLACE} if part["type"] == "text" else {"type": "image"} for part in content]
        marked = [*chat[:turn], chat[turn] | {"content": parts}, *chat[turn + 1 :]]
        before, answer = _template_kept(processor, json.dumps(marked))
        if before.count(_PLACE) == 1 and _PLACE not in answer:
            return before.replace(_PLACE, words[0]), answer
    return _template(processor, chat)


@lru_cache(maxsize=256)
def _template_kept(processor: "Qwen3VLProcessor", chat: str) -> tuple[str, str]:
    return _template(processor, json.loads(chat))


def _template(processor: "Qwen3VLProcessor", messages: list[dict]) -> tuple[str, str]:
    answered = messages[-1]["role"] == "assistant"
    shown = messages[:-1] if answered else messages
    before = processor.apply_chat_template(shown, tools=prompt.TOOLS, add_generation_prompt=True, tokenize=False)
    if not answered:
        return before, ""
    whole = processor.apply_chat_template(messages, tools=prompt.TOOLS, tokenize=False)
    # The template ends a turn with a line break that the model never says.
    return before, whole[len(before) :].removesuffix("\n")


def encode(processor: "Qwen3VLProcessor", messages: list[dict], images: Sequence[np.ndarray] | None = None) -> Encoded:
    """One chat as `encode_all` has it."""
    return encode_all(processor, [messages], None if images is None else [images])[0]


def encode_all(
    processor: "Qwen3VLProcessor", chats: Sequence[list[dict]], images: Sequence[Sequence[np.ndarray]] | None = None
) -> list[Encoded]:
    """Token ids and pixels of chats with the tool `act`; the one way to them for training, playing and RL.

    If a chat's last message is the assistant's, its text becomes the answer. images: each chat's pictures, where they
    are at hand decoded; otherwise they are decoded from the messages. Raises ValueError for a chat whose pictures are
    not as many as the places for them, or have more than 200 times the length of their other side.
    """
    images = [pictures(chat) for chat in chats] if images is None else images
    rendered = [_rendered(processor, chat) for chat in chats]
    asked = _ids(processor.tokenizer, [before for before, _ in rendered])
    answers = [list(_kept_ids(processor.tokenizer, answer)) if answer else [] for _, answer in rendered]
    for ids, of_chat in zip(asked, images, strict=True):
        _count_pictures(processor, ids, len(of_chat))
    seen = [image for of_chat in images for image in of_chat]
    if not seen:
        return [Encoded(ids, answer, None, None) for ids, answer in zip(asked, answers, strict=True)]
    # Said, because it would be guessed: a picture 1 or 3 pixels high would be taken for one of 1 or 3 channels.
    vision = processor.image_processor(images=seen, return_tensors="pt", input_data_format="channels_last")
    grids, patches = vision["image_grid_thw"], vision["image_grid_thw"].prod(dim=1).tolist()
    pixels = vision["pixel_values"].split(patches)
    found, first = [], 0
    for ids, answer, of_chat in zip(asked, answers, images, strict=True):
        mine = slice(first, first := first + len(of_chat))
        tokens = [count // processor.image_processor.merge_size**2 for count in patches[mine]]
        expanded = []
        for token in ids:
            expanded += [token] * tokens.pop(0) if token == processor.image_token_id else [token]
        shown = (torch.cat(pixels[mine]), grids[mine]) if of_chat else (None, None)
        found.append(Encoded(expanded, answer, *shown))
    return found


def batch(processor: "Qwen3VLProcessor", rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Model inputs: prompts padded on the left, answers on the right, so that every answer begins at one column.

    Returns input_ids, attention_mask, mm_token_type_ids (rows, tokens), labels (-100 outside the answers), and
    pixel_values, image_grid_thw for all pictures one after the other. The longest prompt's length is labels.shape[1]
    minus the longest answer's.
    """
    pad = processor.tokenizer.pad_token_id
    left, right = max(len(row.prompt_ids) for row in rows), max(len(row.answer_ids) for row in rows)
    ids = torch.full((len(rows), left + right), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        start, end = left - len(row.prompt_ids), left + len(row.answer_ids)
        ids[index, start:end] = torch.tensor(row.prompt_ids + row.answer_ids)
        mask[index, start:end] = 1
        labels[index, left:end] = ids[index, left:end]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs["mm_token_type_ids"] = (ids == processor.image_token_id).long()
    seen = [row for row in rows if row.pixel_values is not None]
    if seen:
        inputs["pixel_values"] = torch.cat([row.pixel_values for row in seen])
        inputs["image_grid_thw"] = torch.cat([row.image_grid_thw for row in seen])
    return inputs
