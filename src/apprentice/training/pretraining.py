"""What makes the tiny student a base model: it learns to see and to answer in form, from frames of noisy play."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import distributed
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from apprentice import prompt
from apprentice.params import Pretraining, Prompt
from apprentice.players.expert import Expert
from apprentice.student.encoding import batch, encode_all
from apprentice.student.onednn import use_products
from apprentice.student.template import TEMPLATE
from apprentice.world.observation import ACTIONS, ITEMS, TILES, VIEW, VITALS, Observation
from apprentice.world.world import World

_NOISE = 0.4
_EVERY = 5
_WORDS = (
    "sapling", "ripe-plant", "nothing", "owned", "arrow", "asleep", "awake", "facing", "left", "right", "up", "down",
    "last", "at", "user", "assistant", "system",
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """A moment of play: what is seen, and the actions before."""

    observation: Observation
    history: tuple[str, ...]


def frames(seed: int, count: int) -> tuple[int, list[Frame]]:
    """The seed, and frames of its world, a few steps apart. The play is the expert's with much noise.

    The expert only leads to where there is something to see: its actions are not what is learnt.
    """
    found: list[Frame] = []
    world, expert, generator = World(seed), Expert(), np.random.default_rng([seed, 3])
    observation, history = world.reset(), []
    while len(found) < count and not world.done:
        if len(history) % _EVERY == 0:
            found.append(Frame(observation, tuple(history)))
        action = expert.act(observation)
        if generator.random() < _NOISE:
            action = ACTIONS[generator.integers(len(ACTIONS))]
        history.append(action)
        observation = world.step(action).observation
    return seed, found


def vocabulary(settings: Prompt, seen: list[Frame]) -> tuple[list[str], list[str]]:
    """Texts to train a tokenizer on, and the phrases that are the same at every decision."""
    texts = [prompt.text(frame.observation, settings, frame.history) for frame in seen]
    texts += [prompt.grid(frame.observation) for frame in seen]
    # Every word that play can bring up becomes a token, with and without a space before it.
    texts += [f"{word} {word}\n" for word in [*ACTIONS, *ITEMS, *VITALS, *TILES, *_WORDS, *"0123456789"]] * 100
    chat = [
        {"role": "system", "content": prompt.system(settings)},
        {"role": "user", "content": ""},
        prompt.answer(["noop"]),
    ]
    blank = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), chat_template=TEMPLATE)
    rendered = blank.apply_chat_template(chat, tools=prompt.TOOLS, tokenize=False)
    system = rendered[len("<|im_start|>") : rendered.index("<|im_end|>")]
    call = rendered[rendered.rindex("<tool_call>") + len("<tool_call>") : rendered.rindex("</tool_call>")]
    return texts, [system, *call.split("noop")]


def pretrain(
    model,
    processor,
    settings: Prompt,
    seen: list[Frame],
    options: Pretraining,
    seed: int,
    rounded: bool = False,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train all weights to see, and to answer a turn of play in form: with a random valid action.

    At each visual token the model learns to say what that cell of the picture shows: the tile, or how many of an item.
    After the picture it learns to go on with the status and the reply. Naming the cells in a text after the picture
    instead had not begun to work after 400 steps; this takes 100 (LOG.md). Each rank takes its share of every batch.
    rounded: as onednn.use_products has it. progress: called with the step and the loss of this rank's share.
    """
    generator = np.random.default_rng([seed, 4])
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    use_products(model, rounded)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps + 1, pct_start=0.1
    )
    model.train()
    for step in range(options.steps):
        chosen = generator.integers(len(seen), size=options.batch_size)[rank::ranks]
        replies = generator.integers(len(ACTIONS), size=options.batch_size)[rank::ranks]
        lesson = _lesson(processor, settings, [seen[index] for index in chosen], replies)
        loss = model(**lesson).loss
        if ranks == 1:
            loss.backward()
        else:
            _backward(model, loss, lesson["labels"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, loss.item())
    model.eval()


def _backward(model: Qwen3VLForConditionalGeneration, loss: torch.Tensor, labels: torch.Tensor) -> None:
    """Gradients of the mean over all ranks' labels. loss: the mean over this rank's."""
    mine = (labels[:, 1:] != -100).sum()
    distributed.all_reduce(total := mine.clone())
    (loss * mine / total).backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    distributed.all_reduce(together := torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


@torch.inference_mode()
def sight(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, settings: Prompt, held_out: list[Frame]
) -> dict[str, float]:
    """How well a model sees, on frames it was not trained on: shares of cells that it names rightly.

    `tiles`: the 63 of the world; `tiles_other_than_grass`; `inventory`: the 16 of vitals and items, where shown.
    """
    inputs = _lesson(processor, settings, held_out, np.zeros(len(held_out), int))
    labels = inputs.pop("labels")[:, 1:]
    right = model(**inputs).logits[:, :-1].argmax(dim=-1) == labels
    whole = settings.picture == "whole"
    shape = (len(held_out), VIEW[0] * (VIEW[1] + 2 * whole))
    at_picture = (inputs["input_ids"] == processor.image_token_id)[:, :-1]
    right, labels = right[at_picture].view(shape), labels[at_picture].view(shape)
    tiles, cells = right[:, : VIEW[0] * VIEW[1]], labels[:, : VIEW[0] * VIEW[1]]
    grass = _word(processor, "grass")
    found = {
        "tiles": tiles.float().mean().item(),
        "tiles_other_than_grass": tiles[cells != grass].float().mean().item(),
    }
    if whole:
        found["inventory"] = right[:, VIEW[0] * VIEW[1] :][:, : len(VITALS + ITEMS)].float().mean().item()
    return found


def _lesson(processor: Qwen3VLProcessor, settings: Prompt, chosen: list[Frame], replies: np.ndarray) -> dict:
    """Model inputs and labels for these frames, each a turn of play. replies: to each, an index into ACTIONS."""
    chats = [
        [
            *prompt.messages(frame.observation, settings, frame.history, inline=False),
            prompt.answer([ACTIONS[reply]]),
        ]
        for frame, reply in zip(chosen, replies, strict=True)
    ]
    pictures = [prompt.pictures(frame.observation, settings) for frame in chosen]
    inputs = batch(processor, encode_all(processor, chats, pictures))
    if settings.mode == "text":
        return inputs
    ids = inputs["input_ids"]
    picture_ends = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    after = (ids == picture_ends).long().cumsum(dim=1).bool() & (ids != picture_ends) & inputs["attention_mask"].bool()
    labels = ids.masked_fill(~after, -100)
    # The label of a place is what the token before it should say.
    at_picture = (ids == processor.image_token_id).roll(1, dims=1)
    cells = [_cells(processor, settings, frame.observation) for frame in chosen]
    labels[at_picture] = torch.tensor([word for words in cells for word in words])
    return inputs | {"labels": labels}


def _cells(processor: Qwen3VLProcessor, settings: Prompt, observation: Observation) -> list[int]:
    """The word for each cell of the picture: tiles above, counts of vitals and items below, where they're shown."""
    words = prompt.grid(observation).split()
    if settings.picture == "whole":
        counts = [*observation.vitals.values(), *observation.inventory.values()]
        words += map(str, counts + [0] * (2 * VIEW[0] - len(counts)))
    return [_word(processor, word) for word in words]


@cache
def _word(processor: Qwen3VLProcessor, word: str) -> int:
    """The token of a word within a text."""
    return processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][-1]
