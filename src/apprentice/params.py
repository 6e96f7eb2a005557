"""params.yaml as a frozen, checked tree; a wrong value is an error before the first step.

Every key has its meaning beside it here, and its value in params.yaml. A profile that extends another has the other's
values but for those that it names. `apprentice settings` prints what all that comes to.
"""

import io
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML, CommentedMap

from apprentice.errors import ConfigError
from apprentice.schema import Section, checked, parsed

PATH = Path("params.yaml")
"""Where a stage finds its parameters: in the folder it is run in, as DVC does."""
MOST_SCALE = 16
"""The most that `prompt.scale` enlarges a picture by; servers are told how large that is."""


def seeds(value: Any) -> tuple[int, ...]:
    """World seeds in order, from "0-99,200-249", a number or a list of either.

    Raises ValueError on anything else, on a backward range and on a seed named twice.
    """
    found: list[int] = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, bool) or not isinstance(item, (int, str)):
            raise ValueError(f'{item!r} is not a seed; write a number, "0-99,200-249" or a list of them')
        for part in str(item).split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not match:
                raise ValueError(f'{part.strip()!r} is not a seed or a range; write for example "0-99,200-249"')
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
            if last >= 2**31:
                raise ValueError(f"seed {last} is too large; seeds are below 2147483648")
            if last - first >= 10_000_000:
                raise ValueError(f"the range {part.strip()} has more than ten million seeds")
            found.extend(range(first, last + 1))
    if not found:
        raise ValueError('no seeds; write for example "0-99"')
    if len(set(found)) < len(found):
        twice = next(seed for seed, number in Counter(found).items() if number > 1)
        raise ValueError(f"seed {twice} is named twice")
    return tuple(found)


Seeds = Annotated[tuple[int, ...], BeforeValidator(seeds)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]


class Prompt(Section):
    """What a player is shown at each decision."""

    mode: Literal["text+image", "image", "text"] = "image"
    """The picture, the surroundings in words, or both. Status and inventory are always given in words."""
    rules: bool = True
    """The system prompt explains the rules and a good order; otherwise it is one line."""
    max_actions: Annotated[int, Field(ge=1, le=20)] = 1
    """The most actions that one reply may ask for."""
    history: Annotated[int, Field(ge=0, le=32)] = 0
    """How many of the last executed actions are shown."""
    inventory: Literal["owned", "all"] = "owned"
    """List what is owned, or every item, so that each stands at the same place at every turn."""
    position: bool = False
    """Show (x, y) on the map."""
    picture: Literal["whole", "world"] = "whole"
    """The world's 9 × 7 cells with two rows of inventory below, or the world alone: 63 cells instead of 81."""
    scale: Annotated[int, Field(ge=1, le=MOST_SCALE)] = 1
    """The recorded picture (72 pixels) is enlarged by this factor, without smoothing."""


def _plain_url(value: str) -> str:
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("is not a URL; write for example https://api.openai.com/v1")
    if "@" in url.netloc or url.query or url.fragment:
        raise ValueError(
            "may hold no user, password, query or fragment, since params.yaml is in git; put the key into an "
            "environment variable and name that under api_key_env"
        )
    return value.rstrip("/")


class Price(Section):
    """Dollars for a million tokens."""

    input: NonNegativeFloat
    cached_input: NonNegativeFloat | None = None
    """For what the provider's prompt cache had; null is as for the others."""
    output: NonNegativeFloat


class Endpoint(Section):
    """A model behind OpenAI's chat API: OpenAI's, vLLM's, anybody's. What is null isn't sent."""

    base_url: Annotated[str, AfterValidator(_plain_url)] = "https://api.openai.com/v1"
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None
    """The NAME of the environment variable that holds the key; null for an endpoint that wants none."""
    temperature: NonNegativeFloat | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None
    """The most tokens of a reply."""
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """How the endpoint calls that: OpenAI's newer models know only the first, some servers only the second."""
    tool_choice: Literal["auto", "required", "none"] | dict[str, Any] | None = None
    use_tools: bool = True
    """false for an endpoint that takes no tools: the system prompt says how a call is written as text, and it's read
    from there."""
    extra_body: dict[str, Any] = {}
    """Further keys of the request, for example chat_template_kwargs for vLLM."""

    # What follows changes no reply, and so no episode.
    price: Price | None = None
    """Instead of the one in prices.yaml."""
    max_cost_usd: PositiveFloat | None = None
    """Dollars that all who ask with these settings may pay together, in all runs: a teacher, an agent of the benchmark,
    the judge, `apprentice serve`. Nothing is asked that could pass them; what isn't known to have cost less counts as
    the most that it can be."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 16
    """Episodes under way at once, each with one request at a time."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for a reply, before it counts as a fault."""
    max_retries: NonNegativeInt = 15
    """After a fault that may pass, with pauses from half a second to eight, or as the server asks: 15 are 80 s."""
    max_failure_rate: Fraction = 0.1
    """Share of episodes that may fail for all retries; with more, the run ends with an error."""

    @property
    def asked(self) -> dict[str, Any]:
        """What changes a reply, JSON-able: part of the name of what was played with it."""
        run = {"api_key_env", "price", "max_cost_usd", "concurrency", "timeout", "max_retries", "max_failure_rate"}
        return self.model_dump(mode="json", exclude=run | ({"use_tools"} if self.use_tools else set()))

    @model_validator(mode="after")
    def _possible(self):
        if self.tool_choice is not None and not self.use_tools:
            raise ValueError("tool_choice does nothing with use_tools: false; remove one of them")
        ours = {"messages", "tools", "stream", "n", "max_completion_tokens", *type(self).model_fields}
        if ours := ours & self.extra_body.keys():
            raise ValueError(f"extra_body may not hold {', '.join(sorted(ours))}: that's set elsewhere, or not at all")
        if "max_tokens_field" in self.model_fields_set and self.max_tokens is None:
            raise ValueError("max_tokens_field does nothing without max_tokens; set that too, or remove it")
        if self.max_cost_usd is not None and self.max_tokens is None:
            raise ValueError("max_cost_usd needs max_tokens: without it, one reply may cost anything")
        return self


class Agent(Section):
    """Who plays without weights of ours: an agent of the benchmark, or a teacher."""

    policy: Literal["expert", "random", "noop", "chat"]
    """chat: a model behind an endpoint. The others are built in."""
    prompt: Prompt = Prompt()
    endpoint: Endpoint | None = None
    """For chat, and only for it."""
    max_calls: PositiveInt | None = None
    """For chat: replies after which an episode ends; null is no cap. A reply that cannot be read counts, and so does
    one that was kept from before. What is asked again after a fault until there is a reply is one call."""

    @model_validator(mode="after")
    def _complete(self):
        if self.policy != "chat":
            for name in ("endpoint", "max_calls"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is only for policy chat, and the policy is {self.policy}; remove one")
        elif not self.endpoint:
            raise ValueError("policy chat needs an endpoint: at least a model, and api_key_env (null without a key)")
        elif "mode" not in self.prompt.model_fields_set:
            raise ValueError("policy chat needs prompt.mode, since pictures cost: text+image, image or text")
        return self


class Tutor(Agent):
    """Who labels the student's own states, or plays as a teacher."""

    rationale: bool = False
    """The expert says in a sentence what it is about to do; the text beside its tool call."""

    @model_validator(mode="after")
    def _has_reasons(self):
        if self.rationale and self.policy != "expert":
            raise ValueError(f"rationale: the policy {self.policy!r} has no reasons; remove it, or set policy: expert")
        return self


class Teacher(Tutor):
    seeds: Seeds
    max_steps: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Environment steps after which an episode ends."""
    explore: Fraction = 0.0
    """Share of actions replaced by random ones when executed; the trace keeps the teacher's own as the label."""


Action = Literal[
    "noop", "move_left", "move_right", "move_up", "move_down", "do", "sleep", "place_stone", "place_table",
    "place_furnace", "place_plant", "make_wood_pickaxe", "make_stone_pickaxe", "make_iron_pickaxe", "make_wood_sword",
    "make_stone_sword", "make_iron_sword",
]  # fmt: skip
"""Crafter's, all of them."""


class Tool(Section):
    """What a call of somebody else's tool means."""

    argument: Annotated[str, Field(min_length=1)] = "actions"
    """Its argument that names an action, or has a list of such names."""
    names: dict[str, Action] = {}
    """Its names of actions → Crafter's. A name that isn't here has to be Crafter's own."""
    action: Action | None = None
    """The action that each of its calls is, whatever the arguments: for a tool as `wait()`."""

    @model_validator(mode="after")
    def _is_one_of_both(self):
        if self.action and {"argument", "names"} & self.model_fields_set:
            raise ValueError("action is for a tool that is one action; leave out argument and names, or action")
        return self


class Import(Section):
    """Somebody else's decisions, beside the teachers' own."""

    file: Annotated[str, Field(min_length=1)]
    """JSONL in OpenAI's chat form, pictures as data: URLs, replies that call the tool `act`; see imports.py. Or a trace
    of another checkout, one of its data/traces/*.parquet: it comes with all that is known of each episode."""
    tools: dict[str, Tool] = {}
    """For replies that call other tools. `interact_many: {}` is our `act` under another name, and `move: {argument:
    direction, names: {left: move_left, right: move_right}}` takes the direction for the action."""

    @property
    def is_trace(self) -> bool:
        return Path(self.file).suffix == ".parquet"

    @model_validator(mode="after")
    def _has_tools_to_read(self):
        if self.tools and self.is_trace:
            raise ValueError("tools: in a trace the replies are read already; leave tools out")
        return self


class Criterion(Section):
    """A point of the judge's rubric."""

    asks: Annotated[str, Field(min_length=1)]
    """In words, what is to be marked from 0 to 10."""
    weight: PositiveFloat = 1.0


class Judge(Section):
    """A model that scores episodes; the score is the weighted mean of its marks, 0 to 1."""

    endpoint: Endpoint
    outcome: Criterion = Criterion(asks="how much the player achieved for the number of steps it had")
    events: dict[Name, Criterion] = {}
    """What to look at from step to step, by a name: survival: {asks: how well it kept its vitals up, weight: 0.5}."""

    @model_validator(mode="after")
    def _without_episodes(self):
        if "max_failure_rate" in self.endpoint.model_fields_set:
            raise ValueError(
                "endpoint.max_failure_rate does nothing for a judge, whose failures end no episode; remove it, and see "
                "filter.judge_missing"
            )
        return self


class Filter(Section):
    """Which episodes and decisions are worth imitating; a limit of null is off.

    Of an import nothing is known but what was shown and answered: only require_valid_tool_calls and deduplicate apply.
    """

    min_steps_per_episode: NonNegativeInt = 5
    max_steps_per_episode: PositiveInt | None = None
    min_achievements_per_episode: Annotated[int, Field(ge=0, le=22)] = 1
    min_unique_states: NonNegativeInt = 0
    """Distinct observations (surroundings, status, inventory) that an episode must have."""
    detect_loops: Literal["off", "decision", "episode"] = "decision"
    """Drop the repeated decisions, or the whole episode that has them."""
    max_repeated_actions: PositiveInt = 5
    """A loop is a longer run of the same action without any effect."""
    require_valid_tool_calls: Literal["off", "decision", "episode"] = "decision"
    """Drop the invalid replies, or the whole episode that has them."""
    deduplicate: bool = True
    """Drop decisions in which the same was seen and the same was answered before."""
    min_judge_score: Fraction | None = None
    """Of the score that the judge gives an episode, 0 to 1."""
    judge_missing: Literal["keep", "drop"] = "keep"
    """What becomes of an episode that the judge could not score."""

    @model_validator(mode="after")
    def _possible(self):
        if self.max_steps_per_episode is not None and self.max_steps_per_episode < self.min_steps_per_episode:
            raise ValueError(
                f"max_steps_per_episode ({self.max_steps_per_episode}) is below min_steps_per_episode "
                f"({self.min_steps_per_episode}): no episode could pass; raise it or set it to null"
            )
        return self


class Split(Section):
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of worlds that sft validates on. 0: none, and sft keeps the adapter of its last step."""
    random_seed: NonNegativeInt = 42
    shuffle: bool = True
    """Shuffle the training rows; otherwise they stand in the order of play."""
    include_rationale: bool = False
    """What the teacher said beside its tool call becomes part of the answer that the student learns."""


class Architecture(Section):
    """The tiny Qwen3-VL: the real classes, small numbers."""

    hidden_size: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    vision_hidden_size: PositiveInt = 96
    vision_layers: PositiveInt = 2
    vision_heads: PositiveInt = 3
    initializer_range: PositiveFloat = 0.1
    vocabulary: PositiveInt = 512


class Pretraining(Section):
    """Frames of random play on which the tiny student learns to see and to answer in form."""

    seeds: Seeds
    frames_per_seed: PositiveInt = 40
    steps: PositiveInt
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 3e-3


class HubStudent(Section):
    model: str
    """A repository of the Hugging Face hub."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The commit, so that the same weights come tomorrow."""


class TinyStudent(Section):
    model: Literal["tiny"]
    random_seed: NonNegativeInt = 0
    architecture: Architecture = Architecture()
    pretraining: Pretraining


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """vLLM serves none above 512."""
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | Annotated[tuple[str, ...], Field(strict=False)] = "all-linear"
    """Names of linear layers, or every linear one. What scores the words (lm_head) stays as it is."""
    vision: bool = True
    """Adapt the vision tower too; without it nothing is computed backwards through it, which saves a fifth."""
    quantization: Literal["nf4"] | None = None
    """Train on a base held in 4 bits (QLoRA, arXiv 2305.14314); the adapter is served on the whole one all the same."""


class Zero(Section):
    """DeepSpeed ZeRO (arXiv 1910.02054): what of a training state the devices divide among them."""

    stage: Literal[0, 2, 3] = 0
    """0: nothing, and without DeepSpeed. 2: the optimizer's state and the gradients. 3: the weights too."""
    offload: bool = False
    """Keep what is divided in the machine's memory instead of the device's."""

    @model_validator(mode="after")
    def _something_to_offload(self):
        if self.offload and not self.stage:
            raise ValueError("offload needs stage 2 or 3; set stage, or offload to false")
        return self


class SftEvaluation(Section):
    """The student's own play on held-out worlds at each validation of sft, since loss says little about it."""

    seeds: Seeds
    max_steps: Annotated[int, Field(ge=1, le=10_000)]
    """Environment steps after which an episode ends."""
    keep: Literal["achievements", "loss"] = "achievements"
    """What decides which adapter the stage gives, and when it stops early: the achievements of this play, or the
    validation's loss. Few worlds tell near adapters apart by chance."""
    max_sampler_mismatch: PositiveFloat = 0.1
    """As rl has it, for a server that plays: it is tested each time."""


class Sft(Section):
    epochs: PositiveFloat = 3
    batch_size: PositiveInt = 32
    """Rows an optimizer step, over all devices."""
    micro_batch_size: PositiveInt = 16
    """The most rows that a device takes at once; the number of devices and of accumulation steps follow."""
    max_length: PositiveInt = 2048
    """Tokens; a longer row is counted and dropped, never cut."""
    learning_rate: PositiveFloat = 5e-5
    warmup_ratio: Fraction = 0.03
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    eval_steps: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Optimizer steps from one validation to the next; below 1, a share of the run. The last step is validated too."""
    eval_rows: PositiveInt | None = 512
    """The most rows to validate on, drawn evenly from all of them and the same each time; null is all."""
    early_stopping_patience: PositiveInt | None = 3
    """Validations without a better loss after which training stops; null trains to the end. Where `evaluation` keeps
    the adapter by achievements, it counts those without more of them."""
    evaluation: SftEvaluation | None = None
    """Play at each validation; null is none. It takes as long as so many episodes of the benchmark do."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more time."""
    zero: Zero = Zero()
    random_seed: NonNegativeInt = 0
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _whole_weights(self):
        if self.lora.quantization and self.zero.stage == 3:
            raise ValueError("lora.quantization cannot go with zero.stage 3, which divides weights; set stage to 2")
        if self.evaluation and self.zero.stage == 3:
            raise ValueError("evaluation cannot go with zero.stage 3, which divides weights; set stage to 2")
        return self


class Distill(Section):
    """On-policy distillation: rounds of the student's own play, in which a teacher labels its states (DAgger).

    A round trains on the labels of all rounds so far, all weighted alike, and on rows of sft.
    """

    rounds: NonNegativeInt
    """0: none, and models/distill is models/sft."""
    seeds: Seeds
    """World seeds to play on, taken in order and again from the start when used up."""
    worlds: PositiveInt
    """Episodes a round, each on a world of its own."""
    max_steps: Annotated[int, Field(ge=1, le=10_000)]
    """Environment steps after which an episode ends."""
    teacher: Tutor
    """Who says what it would have done. A model behind an endpoint is paid for each of the student's decisions."""
    teacher_share: Fraction = 0.0
    """Share of the first round's decisions in which the teacher's answer is carried out, drawn one by one."""
    teacher_decay: Fraction = 0.5
    """Times this, from one round to the next."""
    sft_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a round's rows that come from data/sft/train.jsonl."""
    steps: PositiveInt
    """Optimizer steps a round."""
    batch_size: PositiveInt = 32
    """Rows an optimizer step, over all devices."""
    micro_batch_size: PositiveInt = 16
    """The most rows that a device takes at once; the number of devices and of accumulation steps follow."""
    learning_rate: PositiveFloat = 2e-5
    """The highest; the schedule falls over all rounds together."""
    warmup_ratio: Fraction = 0.03
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more time."""
    quantization: Literal["nf4"] | None = None
    """Train on a base held in 4 bits (QLoRA, arXiv 2305.14314). It's played with the whole base."""
    max_sampler_mismatch: PositiveFloat = 0.1
    """As rl has it, for a server that plays: it is tested before each round."""
    random_seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _worlds_of_their_own(self):
        if self.worlds > len(self.seeds):
            raise ValueError(f"worlds is {self.worlds}, and seeds are {len(self.seeds)}; name more seeds")
        return self

    @field_validator("teacher")
    @classmethod
    def _labels_every_decision(cls, teacher: Tutor) -> Tutor:
        if teacher.max_calls is not None:
            raise ValueError(
                "max_calls ends a teacher's own episodes, and here the student plays; remove it, and lower max_steps "
                "for fewer calls"
            )
        return teacher


Achievement = Literal[
    "collect_coal", "collect_diamond", "collect_drink", "collect_iron", "collect_sapling", "collect_stone",
    "collect_wood", "defeat_skeleton", "defeat_zombie", "eat_cow", "eat_plant", "make_iron_pickaxe", "make_iron_sword",
    "make_stone_pickaxe", "make_stone_sword", "make_wood_pickaxe", "make_wood_sword", "place_furnace", "place_plant",
    "place_stone", "place_table", "wake_up",
]  # fmt: skip


class Reward(Section):
    unique: float = 1.0
    """For each achievement unlocked for the first time in the episode."""
    achievements: dict[Achievement, float] = {}
    """Times `unique`, by achievement; 1 for those not named."""
    stepwise: float = 0.0
    """For each decision that unlocks something, however much."""
    health: float = 0.1
    """Per health point gained (or lost)."""
    invalid: float = 0.0
    """For a reply that could not be read; usually negative."""
    judge: float = 0.0
    """Times the judge's score (0 to 1), at the end of the episode. Without a score, that is the mean of the group's."""


class Evaluation(Section):
    """RL's own play on held-out worlds; the adapter that does best there is what the stage gives."""

    seeds: Seeds
    every: PositiveInt = 5
    """Iterations from one to the next; before the first and after the last it's done anyway."""


class Rl(Section):
    seeds: Seeds
    """World seeds to train on, taken in order and again from the start when used up."""
    evaluation: Evaluation
    iterations: PositiveInt
    """Each is a generation of episodes and the training on them."""
    groups: PositiveInt
    """World seeds an iteration."""
    group_size: Annotated[int, Field(ge=2)]
    """Episodes on the same seed, compared with each other."""
    max_steps: Annotated[int, Field(ge=1, le=10_000)]
    """Environment steps after which an episode ends."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.99
    advantage: Literal["return_to_go", "grpo", "gigpo", "linear", "critic"] = "critic"
    """What a decision is compared with; each is a function, or the class Critic, of advantages.py, with its paper.
    return_to_go: what the others of its group got from the same decision on. grpo: their whole episodes. gigpo: that,
    and what they got from the same state on. linear, critic: what a value function expects, of features of the state,
    and of the student's own hidden state too."""
    scale_rewards: Literal["group", "batch", "none"] = "batch"
    """Whose standard deviation advantages are divided by: their group's, all decisions' of the iteration, none.
    linear and critic know no group."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.9
    """How far linear and critic look ahead before they trust their own values; 1 waits for the episode's end."""
    value_clip: PositiveFloat | None = None
    """How far an iteration may move what linear and critic expect of a state from what they expected before, in
    standard deviations of the return: PPO's value clipping, for a critic that is solved for. null: without bound."""
    anchor_weight: NonNegativeFloat = 1.0
    """Weight of the part of gigpo's advantages that compares steps at the same anchor."""
    temperature: PositiveFloat = 1.0
    decisions: PositiveInt
    """Decisions trained on in an iteration, drawn from those played; a multiple of batch_size."""
    epochs: PositiveInt = 1
    """Passes over the decisions of an iteration."""
    batch_size: PositiveInt = 64
    """Decisions an optimizer step, over all devices."""
    micro_batch_size: PositiveInt = 32
    """The most decisions that a device takes at once; the number of devices and of accumulation steps follow."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: a third slower, a fraction of the memory."""
    quantization: Literal["nf4"] | None = None
    """Train on a base held in 4 bits (QLoRA, arXiv 2305.14314). It's played with the whole base, as it's benchmarked;
    importance_sampling corrects for the difference."""
    learning_rate: PositiveFloat = 1e-5
    warmup_ratio: Fraction = 0.1
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "constant_with_warmup"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    kl_coefficient: NonNegativeFloat = 0.1
    """Weight of the KL divergence to the policy at the start. With 0.01 the tiny student's form of a call drifted."""
    entropy_coefficient: float = 0.0
    """Weight of the mean entropy of a token, as a bonus; below 0 it's a price."""
    max_grad_norm: PositiveFloat = 1.0
    max_invalid_rate: Fraction = 0.3
    """Share of replies in an iteration's play that cannot be read; with more, training stops."""
    max_kl: PositiveFloat = 0.3
    """KL divergence to the policy at the start, nats a token, mean of what an iteration trains on; with more, training
    stops."""
    max_sampler_mismatch: PositiveFloat = 0.1
    """Distance of the sampler's log-probabilities from the trainer's for the same weights, nats a token; with more,
    training stops. bfloat16 on vLLM has about 0.01. A server is tested by it, too, before it plays."""
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: an iteration's episodes are played with the policy of the iteration before, by vLLM servers that have GPUs of
    their own (compute.yaml) while that one is still being trained on; anywhere else, at the same point but in turn."""
    importance_sampling: Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """Correction where the sampler is not the trainer: vLLM, bfloat16, an older policy. The ratio of their
    probabilities weighs each token, or each reply; one above the bound is cut to it (truncate) or drops out (mask)."""
    importance_sampling_max: PositiveFloat = 3.0
    zero: Zero = Zero()
    random_seed: NonNegativeInt = 0
    reward: Reward = Reward()

    @model_validator(mode="after")
    def _known_states(self):
        if self.staleness and self.advantage == "critic":
            raise ValueError(
                "staleness does not go with advantage critic, which needs the player's own hidden states; "
                "write advantage: linear"
            )
        return self

    @model_validator(mode="after")
    def _known_groups(self):
        if self.scale_rewards == "group" and self.advantage in ("linear", "critic"):
            raise ValueError(
                f"scale_rewards group does not go with advantage {self.advantage}, which compares with what a value "
                "function expects; set it to batch or none, or advantage to return_to_go, grpo or gigpo"
            )
        return self

    @model_validator(mode="after")
    def _whole_weights(self):
        if self.zero.stage == 3:
            raise ValueError("zero.stage 3 divides weights, which play needs whole; set stage to 2")
        return self

    @model_validator(mode="after")
    def _whole_batches(self):
        if self.decisions % self.batch_size:
            raise ValueError(
                f"decisions ({self.decisions}) is not a multiple of batch_size ({self.batch_size}); "
                f"write {self.decisions // self.batch_size * self.batch_size or self.batch_size}"
            )
        return self


class Sampling(Section):
    """How a student's reply is drawn, in RL's evaluation and in the benchmark."""

    temperature: NonNegativeFloat = 1.0
    max_tokens: PositiveInt = 24
    batch_size: PositiveInt = 32
    """Episodes that are played together; part of the result, since it changes rounding."""


def _kind_of_student(value: Any) -> str:
    model = value.get("model") if isinstance(value, dict) else getattr(value, "model", None)
    return "TinyStudent" if model == "tiny" else "HubStudent"


class Profile(Section):
    """The student and how it's trained. `extends: OTHER` begins with the values of another profile."""

    dtype: Literal["float32", "mixed", "bfloat16"]
    """Of the student's weights, in training and in play. mixed: float32, with products of weights that a processor with
    AMX or AVX512-BF16 rounds to bfloat16, for a sixth less time (LOG.md); on others, and on GPUs, it's float32."""
    toy: bool = False
    """Too small to learn anything, for trying the code: wherever results are shown, they are said to mean nothing."""
    prompt: Prompt
    sampling: Sampling = Sampling()
    student: Annotated[
        Annotated[TinyStudent, Tag("TinyStudent")] | Annotated[HubStudent, Tag("HubStudent")],
        Discriminator(_kind_of_student),
    ]
    sft: Sft
    distill: Distill
    rl: Rl


_PROTOCOL_STEPS = {"quick": 200, "balrog": 2_000, "crafter": 10_000}


class Benchmark(Section):
    """Who plays for the record, and by whose rules."""

    protocol: Literal["quick", "balrog", "crafter"] = "quick"
    """quick: 200 steps, or as many as you like, on as many worlds as you like. balrog (arXiv 2411.13543): 10 episodes
    or more, at most 2,000 steps, and a noop before the first decision that isn't counted; fewer steps, several actions
    a reply, max_calls and a temperature other than 1.0 are said with the result, which isn't by BALROG's rules then.
    crafter (arXiv 2109.06780): 10,000 steps, as for the published Crafter scores."""
    seeds: Seeds
    max_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Environment steps after which an episode ends; null is what the protocol says."""
    agents: dict[Name, Agent] = {name: Agent(policy=name) for name in ("random", "noop", "expert")}
    """Who plays without weights of ours, by name: built in, or a model behind an endpoint."""
    students: dict[Name, Annotated[str, Field(min_length=1)]] = {}
    """Folders of weights to play with, by name: models/base, or an adapter for it. They must be outs of this pipeline,
    or tracked by DVC."""
    bootstrap_samples: PositiveInt = 10_000

    @property
    def steps(self) -> int:
        """The most environment steps of an episode."""
        return self.max_steps or _PROTOCOL_STEPS[self.protocol]

    @property
    def opening(self) -> tuple[str, ...]:
        """Actions before the first decision that count for nothing."""
        return ("noop",) if self.protocol == "balrog" else ()

    @property
    def names(self) -> tuple[str, ...]:
        """All who play."""
        return (*self.agents, *self.students)

    @model_validator(mode="after")
    def _possible(self):
        if not self.names:
            raise ValueError("nobody plays: name one under agents or students")
        if both := self.agents.keys() & self.students.keys():
            raise ValueError(f"{min(both)!r} is both an agent and a student; give one another name")
        most, least = _PROTOCOL_STEPS[self.protocol], 10 if self.protocol == "balrog" else 1
        if self.protocol == "balrog" and self.steps > most:
            raise ValueError(f"max_steps is {self.steps}, and protocol balrog has at most {most}; set it to null")
        if self.protocol == "crafter" and self.steps != most:
            raise ValueError(f"max_steps is {self.steps}, and protocol crafter has {most}; set it to null")
        capped = [name for name, agent in self.agents.items() if agent.max_calls is not None]
        if self.protocol == "crafter" and capped:
            raise ValueError(f"agents.{capped[0]}.max_calls: protocol crafter knows no such end; set it to null")
        if len(self.seeds) < least:
            raise ValueError(f"seeds are {len(self.seeds)}, and protocol balrog has {least} episodes or more")
        return self


class Params(Section):
    profile: Name
    teachers: dict[Name, Teacher]
    imports: dict[Name, Import] = {}
    judge: Judge | None = None
    filter: Filter = Filter()
    split: Split = Split()
    benchmark: Benchmark
    profiles: Annotated[dict[Name, Profile], Field(min_length=1)]

    @property
    def active(self) -> Profile:
        """The profile in use."""
        return self.profiles[self.profile]

    @property
    def held_out(self) -> tuple[int, ...]:
        """World seeds that nothing may be learnt from: others' decisions on them are left out."""
        sft = self.active.sft.evaluation
        return (*self.benchmark.seeds, *self.active.rl.evaluation.seeds, *(sft.seeds if sft else ()))

    @property
    def departures(self) -> tuple[str, ...]:
        """What is played otherwise than BALROG's evaluator does, where protocol balrog is asked for."""
        benchmark, profile = self.benchmark, f"profiles.{self.profile}"
        if benchmark.protocol != "balrog":
            return ()
        played = (self.active.prompt, f"{profile}.sampling", self.active.sampling)
        asked: dict[str, tuple[Prompt, str, Sampling | Endpoint]] = {profile: played} if benchmark.students else {}
        for name, agent in benchmark.agents.items():
            if agent.endpoint:
                place = f"benchmark.agents.{name}"
                asked |= {place: (agent.prompt, f"{place}.endpoint", agent.endpoint)}
        found = [
            f"benchmark.agents.{name}.max_calls is {agent.max_calls}, where BALROG has no such end"
            for name, agent in benchmark.agents.items()
            if agent.max_calls is not None
        ]
        if benchmark.steps < _PROTOCOL_STEPS["balrog"]:
            found.append(f"benchmark.max_steps is {benchmark.steps}, where BALROG has 2000")
        for place, (shown, drawn, sampling) in asked.items():
            if shown.max_actions > 1:
                found.append(f"{place}.prompt.max_actions is {shown.max_actions}, where BALROG asks for each action")
            if sampling.temperature != 1.0:
                own = "null, the endpoint's own" if sampling.temperature is None else sampling.temperature
                since = "where BALROG's evaluator has 1.0 since 2025-03; its results of 2024 are at 0.0"
                found.append(f"{drawn}.temperature is {own}, {since}")
        return tuple(found)

    @model_validator(mode="after")
    def _consistent(self):
        if self.profile not in self.profiles:
            raise ValueError(f"profile: {self.profile!r} is not defined; profiles are {', '.join(self.profiles)}")
        uses_of_judge = {
            "filter.min_judge_score": self.filter.min_judge_score is not None,
            f"profiles.{self.profile}.rl.reward.judge": self.active.rl.reward.judge != 0,
        }
        for key, used in uses_of_judge.items():
            if used and self.judge is None:
                raise ValueError(f"{key} needs a judge: add the section judge with an endpoint, or leave it out")
        if not self.teachers and not self.imports:
            raise ValueError("there is neither a teacher nor an import: name one under teachers or imports")
        for name, source in self.imports.items():
            if name in self.teachers:
                raise ValueError(f"{name!r} is both a teacher and an import; give the import another name")
            outs = (Path(out).resolve() for out in ("data/traces", "data/sft", "data/benchmark"))
            if any(Path(source.file).resolve().is_relative_to(out) for out in outs):
                raise ValueError(
                    f"imports.{name}.file ({source.file}) is made by this pipeline, which would depend on itself; "
                    "copy it to another folder and name the copy"
                )
        for name, teacher in self.teachers.items():
            _teachable(f"teachers.{name}", teacher, f"profiles.{self.profile}", self.active, self.split)
        where = f"profiles.{self.profile}"
        _teachable(f"{where}.distill.teacher", self.active.distill.teacher, where, self.active, self.split)
        uses = {f"teachers.{name}.seeds": teacher.seeds for name, teacher in self.teachers.items()}
        uses[f"{where}.distill.seeds"] = self.active.distill.seeds
        uses[f"profiles.{self.profile}.rl.seeds"] = self.active.rl.seeds
        uses[f"profiles.{self.profile}.rl.evaluation.seeds"] = self.active.rl.evaluation.seeds
        if self.active.sft.evaluation:
            uses[f"{where}.sft.evaluation.seeds"] = self.active.sft.evaluation.seeds
        if isinstance(self.active.student, TinyStudent):
            uses[f"profiles.{self.profile}.student.pretraining.seeds"] = self.active.student.pretraining.seeds
        uses["benchmark.seeds"] = self.benchmark.seeds
        _disjoint(uses)
        return self


def _teachable(where: str, teacher: Tutor, student: str, profile: Profile, split: Split) -> None:
    """Raise ValueError for a teacher whose replies the student's own play would not take."""
    asked, allowed = teacher.prompt.max_actions, profile.prompt.max_actions
    if asked > allowed:
        raise ValueError(
            f"{where}.prompt.max_actions is {asked} and {student}.prompt.max_actions is {allowed}: the student would "
            "be taught replies that its own prompt forbids; set both to the same"
        )
    if not split.include_rationale or not teacher.endpoint:
        return
    said, most = teacher.endpoint.max_tokens, profile.sampling.max_tokens
    if said is None or said > most:
        raise ValueError(
            f"{where}.endpoint.max_tokens is {'not set' if said is None else said} and {student}.sampling.max_tokens "
            f"is {most}: with split.include_rationale the student would be taught reasons that its own replies are cut "
            "off in, before the call; set both to the same, or include_rationale to false"
        )


def _disjoint(uses: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError when two uses that must not see the same world share a seed."""
    names = list(uses)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            if one.startswith("teachers.") and other.startswith("teachers."):
                continue  # teachers may play the same worlds: split keeps a seed on one side
            common = set(uses[one]) & set(uses[other])
            if common:
                raise ValueError(
                    f"{one} and {other} share {len(common)} seeds, for example {min(common)}: results on worlds "
                    "already seen would not count; give each its own range"
                )


def load(path: Path | None = None) -> Params:
    """Read and check the parameters. Raises ConfigError naming the key and what would be right."""
    path = path or PATH
    return _checked(path, parsed(path))


def with_imports(files: dict[str, str], path: Path = PATH) -> str:
    """The text of params.yaml with these imports added (name → file), comments kept. Raises ConfigError as load."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 4096  # long lines stay as they are
    tree = yaml.load(path.read_text())
    sources = tree.setdefault("imports", CommentedMap())
    sources.fa.set_flow_style()
    for name, file in files.items():
        sources.setdefault(name, CommentedMap())["file"] = file
    yaml.dump(tree, text)
    _checked(path, parsed(path, text.getvalue()))
    return text.getvalue()


def _checked(path: Path, tree: Any) -> Params:
    profiles = tree.get("profiles") if isinstance(tree, dict) else None
    if not isinstance(profiles, dict):
        return checked(path, tree, Params)
    whole = tree | {"profiles": {name: extended(profiles, name, path) for name in profiles}}

    def inherited(location: tuple) -> bool:
        """Whether it's a value of another profile, whose own error it is."""
        node = profiles.get(location[1]) if len(location) > 1 and location[0] == "profiles" else None
        if not isinstance(node, dict) or "extends" not in node:
            return False
        for part in location[2:]:
            if not isinstance(node, dict):
                return False
            if part in node:
                node = node[part]
            elif part not in ("TinyStudent", "HubStudent"):
                return True
        return node == {}

    return checked(path, whole, Params, inherited)


SECTIONS = ("prompt", "sampling", "student", "sft", "distill", "rl")
"""What every profile names, if only as {}: dvc.yaml has a stage depend on the sections that it uses."""


def lineage(profiles: dict, name: str, path: Path = PATH) -> list[str]:
    """A profile and those that it extends, the nearest first. Raises ConfigError where that leads nowhere."""
    names = [name]
    while isinstance(profiles[names[-1]], dict) and (parent := profiles[names[-1]].get("extends")) is not None:
        where = f"{path}: profiles.{names[-1]}.extends"
        if parent not in profiles:
            raise ConfigError(f"{where}: there is no profile {parent!r}; profiles are {', '.join(map(str, profiles))}")
        if parent in names:
            raise ConfigError(f"{where}: {parent} extends {names[-1]} in turn; one of them has to stand alone")
        if missing := [section for section in SECTIONS if section not in profiles[names[-1]]]:
            raise ConfigError(f"{path}: profiles.{names[-1]}.{missing[0]}: is required; {{}} is as in {parent}")
        names.append(parent)
    return names


def extended(profiles: dict, name: str, path: Path = PATH) -> Any:
    """A profile's tree with all that it has from those it extends."""
    if not isinstance(profiles[name], dict):
        return profiles[name]
    whole: dict = {}
    for one in reversed(lineage(profiles, name, path)):
        whole = _overlaid(whole, {key: value for key, value in profiles[one].items() if key != "extends"})
    return whole


def _overlaid(under: dict, over: dict) -> dict:
    both = {
        key: _overlaid(under[key], over[key])
        for key in under.keys() & over.keys()
        if isinstance(under[key], dict) and isinstance(over[key], dict)
    }
    return under | over | both
