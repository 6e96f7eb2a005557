"""The tiny student is a real Qwen3-VL, and what it is trained on is what it is asked."""

import numpy as np
import pytest
import torch
from conftest import SHOWN
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from apprentice import prompt
from apprentice.data.chat_rows import row
from apprentice.params import Architecture, Lora, Pretraining, Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.serving import in_process
from apprentice.student import loading, sizes
from apprentice.student.encoding import batch, encode, length, pictures
from apprentice.student.loading import lora_config
from apprentice.student.tiny import build, tokenizer
from apprentice.training import pretraining
from apprentice.world import ACTIONS, World


@pytest.fixture(scope="module")
def episode():
    return play(Scripted("random"), Spec([3], 60, SHOWN))[0]


def test_the_tiny_student_is_what_the_auto_classes_load(tiny, tiny_folder):
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    processor = AutoProcessor.from_pretrained(tiny_folder)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert model.num_parameters() < 1_100_000
    image = World(1).reset().image
    mine = tiny[1].image_processor(images=[image], return_tensors="pt")
    theirs = processor.image_processor(images=[image], return_tensors="pt")
    for name in ("pixel_values", "image_grid_thw"):
        torch.testing.assert_close(mine[name], theirs[name])


def test_the_same_seed_builds_the_same_student(tiny):
    again, _ = build(Architecture(initializer_range=0.3), tiny[1].tokenizer, 0)
    other, _ = build(Architecture(initializer_range=0.3), tiny[1].tokenizer, 1)
    same = [torch.equal(a, b) for a, b in zip(tiny[0].state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same)
    assert not torch.equal(tiny[0].lm_head.weight, other.lm_head.weight)


def test_a_decision_is_short_and_has_one_visual_token_a_tile(tiny, episode):
    for step in episode.steps:
        encoded = encode(tiny[1], row(episode, step, SHOWN)["messages"])
        assert encoded.prompt_ids.count(tiny[1].image_token_id) == 81
        assert len(encoded.prompt_ids) + len(encoded.answer_ids) <= 200
        assert len(encoded.answer_ids) <= 8


@pytest.mark.parametrize("settings", [SHOWN, Prompt(mode="text+image", max_actions=5, history=3, position=True)])
def test_token_ids_and_pixels_are_those_of_the_processor_itself(tiny, episode, settings):
    processor = tiny[1]
    for step in episode.steps[:20]:
        messages = row(episode, step, settings)["messages"]
        mine = encode(processor, messages)
        images = [Image.fromarray(image) for image in pictures(messages)]
        for part in messages[1]["content"]:
            if part["type"] == "image_url":
                part["type"] = "image"
                part["image"] = images[0]
                del part["image_url"]
        theirs = processor.apply_chat_template(
            messages, tools=prompt.TOOLS, tokenize=True, return_dict=True, return_tensors="pt"
        )
        # The template closes the answer with a line break, which the model neither says nor learns.
        closing = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert mine.prompt_ids + mine.answer_ids + closing == theirs["input_ids"][0].tolist()
        torch.testing.assert_close(mine.pixel_values, theirs["pixel_values"])


@pytest.mark.parametrize("settings", [SHOWN, Prompt(mode="text"), Prompt(mode="text+image", scale=3)])
def test_a_rows_length_is_known_without_encoding_it(tiny, episode, settings):
    for step in episode.steps[:10]:
        messages = row(episode, step, settings)["messages"]
        encoded = encode(tiny[1], messages)
        assert length(tiny[1], messages) == len(encoded.prompt_ids) + len(encoded.answer_ids)


def test_training_rows_begin_with_exactly_what_play_shows(tiny, episode):
    for step in episode.steps:
        trained = encode(tiny[1], row(episode, step, SHOWN)["messages"])
        shown = prompt.messages(step.observation, SHOWN, step.history, inline=False)
        asked = encode(tiny[1], shown, [prompt.picture(step.observation, SHOWN)])
        assert trained.prompt_ids == asked.prompt_ids
        torch.testing.assert_close(trained.pixel_values, asked.pixel_values)


def test_what_a_row_teaches_is_what_parse_reads(tiny, episode):
    for step in episode.steps:
        encoded = encode(tiny[1], row(episode, step, SHOWN)["messages"])
        text = tiny[1].tokenizer.decode(encoded.answer_ids[:-1])
        assert prompt.parse({"content": text}).actions == step.asked
        assert encoded.answer_ids[-1] == tiny[1].tokenizer.eos_token_id


def test_a_row_teaches_the_reason_only_when_asked_to(tiny):
    telling = play(Scripted("expert", rationale=True), Spec([3], 5, SHOWN))[0]
    for step in telling.steps:
        silent, reasoned = (row(telling, step, SHOWN, rationale) for rationale in (False, True))
        assert silent["messages"][-1] == prompt.answer(step.asked)
        answer = tiny[1].tokenizer.decode(encode(tiny[1], reasoned["messages"]).answer_ids[:-1])
        assert answer.startswith(step.reply.message["content"])
        assert prompt.parse({"role": "assistant", "content": answer}).actions == step.asked


def test_the_loss_is_on_the_answers_only(tiny, episode):
    rows = [encode(tiny[1], row(episode, step, SHOWN)["messages"]) for step in episode.steps[:8]]
    inputs = batch(tiny[1], rows)
    for labels, encoded in zip(inputs["labels"], rows, strict=True):
        assert labels[labels != -100].tolist() == encoded.answer_ids


def _prompts(processor, episode, count):
    return [
        encode(
            processor, prompt.messages(step.observation, SHOWN, step.history, inline=False), [step.observation.image]
        )
        for step in episode.steps[:count]
    ]


def test_greedy_answers_are_those_of_transformers_generate(tiny, episode):
    model, processor = tiny
    for encoded in _prompts(processor, episode, 6):
        inputs = batch(processor, [encoded])
        del inputs["labels"]
        theirs = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=in_process.vision_tokens(processor)
        )[0, len(encoded.prompt_ids) :].tolist()
        (mine, *_), *_ = in_process.generate(model, processor, [encoded], np.zeros((1, 8)), 0.0)
        assert mine == theirs


def test_an_answer_does_not_depend_on_who_else_is_asked(tiny, episode):
    model, processor = tiny
    rows = _prompts(processor, episode, 6)
    draws = np.random.default_rng(0).random((6, 6))
    together = in_process.generate(model, processor, rows, draws, 1.0)
    for encoded, draw, (ids, logprobs, _) in zip(rows, draws, together, strict=True):
        (alone, alone_logprobs, _), *_ = in_process.generate(model, processor, [encoded], draw[None], 1.0)
        assert alone == ids
        np.testing.assert_allclose(alone_logprobs, logprobs, atol=1e-4)


def test_logprobs_are_those_of_a_forward_pass_and_no_vision_token_is_sampled(tiny, episode):
    model, processor = tiny
    encoded = _prompts(processor, episode, 1)[0]
    draws = np.random.default_rng(1).random((200, 1))
    answers = in_process.generate(model, processor, [encoded] * 200, draws, 1.0)
    inputs = batch(processor, [encoded])
    del inputs["labels"]
    logits = model(**inputs).logits[0, -1].detach().double()
    logits[in_process.vision_tokens(processor)] = -torch.inf
    expected = logits.log_softmax(-1)
    for (token,), (logprob,), _ in answers:
        assert token not in in_process.vision_tokens(processor)
        assert logprob == pytest.approx(expected[token].item(), abs=1e-4)


def test_sampling_follows_the_probabilities(tiny, episode):
    model, processor = tiny
    encoded = _prompts(processor, episode, 1)[0]
    draws = (np.arange(400)[:, None] + 0.5) / 400
    tokens = [ids[0] for ids, *_ in in_process.generate(model, processor, [encoded] * 400, draws, 1.0)]
    inputs = batch(processor, [encoded])
    del inputs["labels"]
    logits = model(**inputs).logits[0, -1].detach()
    logits[in_process.vision_tokens(processor)] = -torch.inf
    likeliest = logits.argmax().item()
    assert tokens.count(likeliest) / 400 == pytest.approx(logits.softmax(-1)[likeliest].item(), abs=0.01)


def test_a_student_plays_and_its_replies_are_recorded_whatever_they_are(tiny):
    model, processor = tiny
    policy = in_process.InProcess("base", model, processor, 1.0, 8)
    episodes = play(policy, Spec([1, 2, 1], 5, SHOWN))
    for episode in episodes:
        assert episode.length == 5
        for step in episode.steps:
            assert step.executed == (step.asked or ("noop",))
            assert bool(step.invalid) == (not step.asked)
    replies = [[step.reply.message["content"] for step in episode.steps] for episode in episodes]
    assert replies[0] != replies[2]  # the same world, other draws
    again = play(in_process.InProcess("base", model, processor, 1.0, 8), Spec([1, 2, 1], 5, SHOWN))
    assert [[step.reply.message["content"] for step in episode.steps] for episode in again] == replies


def test_waiting_episodes_are_answered_together(tiny, monkeypatch):
    model, processor = tiny
    sizes = []
    generate = in_process.generate

    def counted(model, processor, rows, draws, temperature):
        sizes.append(len(rows))
        return generate(model, processor, rows, draws, temperature)

    monkeypatch.setattr(in_process, "generate", counted)
    play(in_process.InProcess("base", model, processor, 1.0, 2), Spec([1, 2, 3, 4], 3, SHOWN))
    assert sizes == [4, 4, 4]


def test_a_merged_adapter_answers_as_the_adapter_does(tiny_folder, episode):
    from peft import LoraConfig, get_peft_model

    from apprentice.training.sampler import InProcessSampler

    model, processor = loading.load(tiny_folder)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    copy, _ = loading.load(tiny_folder)
    InProcessSampler(copy, processor).update(adapted, 0)
    inputs = batch(processor, _prompts(processor, episode, 3))
    del inputs["labels"]
    with torch.no_grad():
        torch.testing.assert_close(copy(**inputs).logits, adapted(**inputs).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(copy(**inputs).logits, loading.load(tiny_folder)[0](**inputs).logits, atol=1e-2)


def test_a_few_steps_of_pretraining_teach_the_student_to_see():
    worlds = dict(pretraining.frames(seed, 20) for seed in range(100_000, 100_008))
    held_out, seen = worlds.pop(100_000), [frame for world in worlds.values() for frame in world]
    tokens = tokenizer(*pretraining.vocabulary(SHOWN, seen), 512)
    model, processor = build(Architecture(), tokens, 0)
    before = pretraining.sight(model, processor, SHOWN, held_out)
    options = Pretraining(seeds="0", steps=40, batch_size=16)
    pretraining.pretrain(model, processor, SHOWN, seen, options, seed=0)
    after = pretraining.sight(model, processor, SHOWN, held_out)
    assert after["inventory"] > 0.9 > before["inventory"]
    assert after["tiles"] > 0.6 > before["tiles"]
    assert set(ACTIONS)  # every action is a word of the tokenizer
    for action in ACTIONS:
        assert len(processor.tokenizer(f" {action}")["input_ids"]) <= 2


def test_the_world_alone_is_63_visual_tokens_and_sight_is_of_them():
    shown = Prompt(mode="image", rules=False, picture="world")
    seen = pretraining.frames(100_000, 4)[1]
    model, processor = build(Architecture(), tokenizer(*pretraining.vocabulary(shown, seen), 512), 0)
    lesson = pretraining._lesson(processor, shown, seen, np.zeros(len(seen), int))
    assert (lesson["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [63] * len(seen)
    said = lesson["labels"][0][(lesson["input_ids"][0] == processor.image_token_id).roll(1)]
    assert processor.tokenizer.decode(said).split() == prompt.grid(seen[0].observation).split()
    assert set(pretraining.sight(model, processor, shown, seen)) == {"tiles", "tiles_other_than_grass"}


def test_folded_lora_is_the_same_function_with_the_same_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5))
    model = get_peft_model(layer, LoraConfig(r=3, lora_alpha=7, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(4, 6)
    found = []
    for form in (lambda model: model, loading.fold):
        model.zero_grad()
        out = form(model)(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), layer[0].get_base_layer()(x))


def test_on_gpus_as_on_a_cpu_only_the_decoder_is_held_in_four_bits(tmp_path, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    sizes.build(sizes.config("2b", layers=2, width=128)).save_pretrained(tmp_path)
    sizes.processor(SHOWN).save_pretrained(tmp_path)
    found = []
    for used in (False, True):
        monkeypatch.setattr("apprentice.gpus.used", lambda used=used: used)
        monkeypatch.setattr("torch.cuda.current_device", lambda: "cpu")
        model, _ = loading.load(tmp_path, quantization="nf4")
        found.append({name for name, module in model.named_modules() if isinstance(module, Linear4bit)})
    assert found[0] == found[1] and found[0]
    assert all(name.startswith("model.language_model.layers.") for name in found[1])


def test_lora_learns_on_a_base_in_four_bits(tiny_folder, episode):
    quantized, processor = loading.load(tiny_folder, quantization="nf4")
    whole, _ = loading.load(tiny_folder)
    assert quantized.get_memory_footprint() < 0.7 * whole.get_memory_footprint()
    rows = batch(processor, [encode(processor, row(episode, step, SHOWN)["messages"]) for step in episode.steps[:4]])
    with torch.no_grad():
        assert abs(quantized(**rows).loss - whole(**rows).loss) < 0.1 * whole(**rows).loss
    model = get_peft_model(quantized, lora_config(Lora(rank=8, alpha=16)))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(**rows).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
