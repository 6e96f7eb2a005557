"""Can sft's rows be prepared as fast as GPUs take them, and in how much memory?

    python benchmarks/sft_data.py                 # rows a second by number of readers, against what a GPU needs
    python benchmarks/sft_data.py padding         # how much of what is computed on is padding
    python benchmarks/sft_data.py memory 1000000  # peak memory with a file of so many rows

Rows are the expert's, in the form of the profile qwen2b (for memory, short ones). If models/base is a hub's model, it's
its processor that is measured; otherwise that of student/sizes.py, whose rows are about as long.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import apprentice  # noqa: F401  (makes torchvision importable)

ROOT = Path(__file__).parent.parent
PEAK = 989e12
"""Dense bfloat16 operations a second of an H200, NVIDIA's data sheet."""


def main(what: str = "speed", count: str = "1000000", *rest: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("APPRENTICE_CACHE", folder)
        if what == "memory":
            memory(Path(folder), int(count))
        elif what == "train":
            train(Path(count), Path(rest[0]))
        else:
            {"speed": speed, "padding": padding}[what](Path(folder))


def speed(folder: Path) -> None:
    """Rows a second for each number of readers, and what GPUs take."""
    from torch.utils.data import DataLoader

    from apprentice import prompt
    from apprentice.cloud.estimate import rates
    from apprentice.data import dataset
    from apprentice.data.chat_rows import characters
    from apprentice.data.dataset import Jsonl
    from apprentice.student import loading
    from apprentice.training import examples
    from apprentice.workers import cores

    file, base = prepared(folder, "qwen2b", 960)
    began = time.process_time()
    survey = examples.survey(file, base, "speed")
    took = time.process_time() - began
    text = characters(Jsonl(file, survey.places)[0]["messages"]) + len(json.dumps(prompt.TOOLS))
    tokens = text / rates()["text"]["characters_per_token"] + 81  # as Qwen's own tokenizer has them
    print(f"{len(survey.lengths)} rows, {file.stat().st_size / len(survey.lengths):.0f} bytes each")
    print(f"their lengths: {took / len(survey.lengths) * 1000:.2f} ms of CPU a row")
    rows = examples.Rows(file, loading.processor(base), survey.places, dataset.order(survey.lengths, 32, 1, 0))
    began = time.process_time()
    for first in range(0, 320, 16):
        rows.collate(list(rows.dataset.select(range(first, first + 16))))
    took = (time.process_time() - began) / 320
    print(f"encoded and collated: {took * 1000:.2f} ms of CPU a row, so at most {1 / took:.0f} rows/s a reader")
    print("\nreaders  rows/s")
    for readers in [0, *(count for count in (1, 2, 4, 8) if count <= cores())]:
        loader = iter(DataLoader(rows.dataset, batch_size=16, num_workers=readers, collate_fn=rows.collate))
        next(loader)  # processes have started
        began, found = time.monotonic(), sum(len(batch["input_ids"]) for batch in loader)
        print(f"{readers:7} {found / (time.monotonic() - began):7.0f}")
    print(f"\nneeded by one GPU, rows/s, with about {tokens:.0f} tokens each:")
    for model, parameters in (("Qwen/Qwen3-VL-2B-Instruct", 2.1e9), ("Qwen/Qwen3-VL-8B-Instruct", 8.8e9)):
        most = PEAK / (6 * parameters * tokens)
        print(
            f"{model}: {most:.0f} at most, were all of an H200's arithmetic used (989 TFLOPS, 6 operations a parameter "
            f"and token); trainers reach 40 %, {0.4 * most:.0f}"
        )


def padding(folder: Path) -> None:
    """The share of padding in micro-batches of 8, 16 and 32 of a batch of 32, in the order of training and shuffled."""
    import numpy as np

    from apprentice.data import dataset
    from apprentice.data.dataset import Jsonl
    from apprentice.student import loading
    from apprentice.student.encoding import batch, encode_all
    from apprentice.training import examples

    print("rows                       at once  in order  shuffled")
    for name, form in (("tiny", "tiny"), ("qwen2b", "qwen2b"), ("qwen2b, text, tiny mixed", "mixed")):
        file, base = prepared(folder, form, 960)
        survey, processor = examples.survey(file, base, f"padding {form}"), loading.processor(base)
        lines = Jsonl(file, survey.places)
        encoded = encode_all(processor, [lines[place]["messages"] for place in range(len(lines))])
        orders = dataset.order(survey.lengths, 32, 1, 0), np.random.default_rng(0).permutation(len(lines))
        for at_once in (8, 16, 32):
            shares = []
            for chosen in orders:
                masks = [
                    batch(processor, [encoded[place] for place in chosen[first : first + at_once]])["attention_mask"]
                    for first in range(0, len(chosen), at_once)
                ]
                shares.append(1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks))
            print(f"{name:26} {at_once:7} {shares[0]:9.1%} {shares[1]:9.1%}", flush=True)


def memory(folder: Path, most: int) -> None:
    """Peak memory of the data path, survey included, for 10,000 rows and for many, each in a process of its own."""
    print("     rows   file  survey  peak after it  after 3,200 rows read")
    file, base = prepared(folder, "text", 2000)
    for count in (10_000, most):
        many = folder / f"{count}.jsonl"
        with many.open("wb") as out:
            for _ in range(count // 2000):
                out.write(file.read_bytes())
        command = [sys.executable, __file__, "train", str(many), str(base)]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip(), flush=True)


def train(file: Path, base: Path) -> None:
    """Survey the file in this process, and read 100 batches of the order of three epochs."""
    from apprentice.data import dataset
    from apprentice.student import loading
    from apprentice.training import examples

    # To count tokens takes minutes and no memory: here each character is one.
    examples.length, examples._ALONE = lambda processor, messages: len(messages[1]["content"][0]["text"]), 1 << 60
    began = time.monotonic()
    survey = examples.survey(file, base, file.name)
    surveyed, peak = time.monotonic() - began, peak_megabytes()
    rows = examples.Rows(file, loading.processor(base), survey.places, dataset.order(survey.lengths, 32, 3, 0))
    for first in range(0, 3200, 32):
        rows.collate(list(rows.dataset.select(range(first, first + 32))))
    size = file.stat().st_size / 1e9
    print(f"{len(survey.places):9,} {size:4.1f}GB {surveyed:6.0f}s {peak:11.0f}MB {peak_megabytes():20.0f}MB")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepared(folder: Path, form: str, count: int) -> tuple[Path, Path]:
    """A file of so many rows, and the folder of a processor to read them with."""
    from apprentice import params
    from apprentice.data.chat_rows import row
    from apprentice.data.dataset import write_jsonl
    from apprentice.play import Spec, play
    from apprentice.players.scripted import Scripted

    profiles = params.load(ROOT / "params.yaml").profiles
    text = profiles["qwen2b"].prompt.model_copy(update={"mode": "text"})
    shown = {
        "tiny": [profiles["tiny"].prompt],
        "qwen2b": [profiles["qwen2b"].prompt],
        "mixed": [profiles["qwen2b"].prompt, text, profiles["tiny"].prompt],
        "text": [profiles["tiny"].prompt.model_copy(update={"mode": "text"})],
    }[form]
    episodes = play(Scripted("expert"), Spec(range(12), 200, shown[0]))
    rows = [row(episode, step, settings) for episode in episodes for step in episode.steps for settings in shown]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{form}-{count}.jsonl"
    write_jsonl(file, islice(cycle(rows), count))
    return file, processor(folder / f"base-{form}", profiles["tiny" if form in ("tiny", "text") else "qwen2b"])


def processor(folder: Path, profile) -> Path:
    """The folder of a processor that reads this profile's rows."""
    from apprentice.params import Architecture, HubStudent
    from apprentice.student import sizes
    from apprentice.student.tiny import build, tokenizer
    from apprentice.training import pretraining

    if isinstance(profile.student, HubStudent):
        hub = ROOT / "models/base"
        if (hub / "vocab.json").exists():
            return hub
        sizes.processor(profile.prompt).save_pretrained(folder)
        return folder
    _, seen = pretraining.frames(100_000, 8)
    for part in build(Architecture(), tokenizer(*pretraining.vocabulary(profile.prompt, seen), 4096), 0):
        part.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
