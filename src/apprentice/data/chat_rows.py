"""An episode's decisions as rows for fine-tuning, in OpenAI's chat form."""

from apprentice import prompt
from apprentice.episode import Episode, Given, Step
from apprentice.params import Prompt


def row(episode: Episode, step: Step, settings: Prompt, rationale: bool = False) -> dict:
    """One decision of an episode as a row for fine-tuning, in OpenAI's chat form, rendered with these settings.

    The answer is what the teacher asked for, whatever exploration made of it; the actions shown as the last ones are
    those executed. An imported decision is shown as it came, not with these settings; what spells a special token is
    plain letters. rationale: with what it said before its tool call.
    """
    if isinstance(step.observation, Given):
        shown, has_image = prompt.given(step.observation), step.observation.png is not None
    else:
        shown, has_image = prompt.messages(step.observation, settings, step.history), settings.mode != "text"
    # A call written as text (Hermes) stands in the content too, and is not to be said twice.
    words = prompt.said(step.reply.message).split("<tool_call>")[0].strip() if rationale else ""
    return {
        "messages": prompt.plain([*shown, prompt.answer(step.asked, words or None)]),
        "tools": prompt.TOOLS,
        "metadata": {
            "episode_id": episode.id,
            "step": step.step,
            "seed": episode.seed,
            "has_image": has_image,
            "teacher": episode.agent,
            "model": step.reply.model,
        },
    }


def refused(row: dict, max_actions: int) -> str:
    """Why the student's own play would not take a row's answer; empty if it would."""
    said = {"role": "assistant", "content": prompt.spoken(row["messages"][-1])}
    return prompt.parse(said, max_actions).invalid


def characters(messages: list[dict]) -> int:
    """How much text a chat has, pictures not counted."""
    texts = [prompt.said(message) for message in messages]
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    return sum(map(len, texts + calls))
