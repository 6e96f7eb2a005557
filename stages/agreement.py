"""agreement: what the SFT student answers where the teacher's decision is known and held out; a confusion matrix.

    dvc repro agreement        or: python stages/agreement.py

metrics/plots/agreement.csv has a row for each decision of data/sft/val.jsonl (of 1,024 at most, evenly drawn): what the
teacher did, and what the student answers at temperature 0; of several actions the first. The student answers in
process, one on each GPU. A stage of its own, so that only another student or other data makes it run again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.stage import run, write_plot

BASE, DATA, MOST = Path("models/base"), Path("data/sft/val.jsonl"), 1024


def main() -> None:
    """Ask the SFT student what the teacher was asked."""
    profile = params.load().active

    from apprentice.data.dataset import Jsonl
    from apprentice.progress import Progress
    from apprentice.serving import processes
    from apprentice.workers import cores, in_processes

    count = len(Jsonl(DATA))
    if not count:
        write_plot("agreement", ["teacher", "student"], [])
        print("agreement: no decision was held out (split.val_fraction)")
        return
    rows = list(range(0, count, -(-count // MOST)))
    together = profile.sampling.batch_size
    places = processes.places(BASE, profile.dtype, -(-len(rows) // together))
    threads = max(1, cores() // len(places))
    shares = [rows[start :: len(places)] for start in range(len(places))]
    calls = [(share, profile.dtype, profile.sampling.max_tokens, together, threads) for share in shares]
    with Progress("agreement", {"decision": len(rows)}) as progress:
        progress.begin("decision", "answers")
        found = sorted(pair for pairs in in_processes(answers, calls, places) for pair in pairs)
    write_plot("agreement", ["teacher", "student"], [pair for _, *pair in found])
    same = sum(teacher == student for _, teacher, student in found)
    print(f"agreement: the SFT student answers {same} of {len(found)} held-out decisions as the teacher did")


def answers(rows: list[int], dtype: str, max_tokens: int, together: int, threads: int) -> list[tuple[int, str, str]]:
    """(row, the teacher's action, the student's) for these rows; the student's is "invalid" if it can't be read."""
    import numpy as np

    from apprentice import prompt
    from apprentice.data.dataset import Jsonl
    from apprentice.serving.in_process import generate, load
    from apprentice.student.encoding import encode_all

    student = load("sft", "models/sft", dtype, 0.0, max_tokens, threads)
    processor = student.processor
    data, found = Jsonl(DATA), []
    for start in range(0, len(rows), together):
        places = rows[start : start + together]
        chats = [data[place]["messages"] for place in places]
        shown = encode_all(processor, [chat[:-1] for chat in chats])
        replies = generate(student.model, processor, shown, np.zeros((len(shown), max_tokens)), temperature=0.0)
        for place, chat, (ids, *_) in zip(places, chats, replies, strict=True):
            text = processor.tokenizer.decode([token for token in ids if token != processor.tokenizer.eos_token_id])
            pair = (chat[-1], {"role": "assistant", "content": text})
            found.append((place, *((*prompt.parse(message).actions, "invalid")[0] for message in pair)))
    return found


if __name__ == "__main__":
    run(main)
