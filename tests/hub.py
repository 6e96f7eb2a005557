"""A hub with one model: Qwen3-VL-2B-Instruct as Hugging Face's hub has it, but for layers, widths and words.

Two layers, narrow, with random weights; its words are learnt from what a player is shown. Ids, the number of words, the
image processor and the files' names and forms are the real ones.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import torch

from apprentice.params import Prompt
from apprentice.student import sizes

TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 262144,
    "clean_up_tokenization_spaces": False,
}
PICTURES = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "top_p": 0.8,
    "top_k": 20,
    "temperature": 0.7,
    "repetition_penalty": 1.0,
}


def write(folder: Path, shown: Prompt) -> None:
    """The model's files. shown: what its words are learnt from."""
    folder.mkdir(parents=True)
    sizes.build(sizes.config("2b", layers=2, width=64)).to(torch.bfloat16).save_pretrained(folder)
    processor = sizes.processor(shown)
    processor.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config": TOKENIZER | {"chat_template": processor.chat_template},
        "preprocessor_config": PICTURES | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config": PICTURES | {"video_processor_type": "Qwen3VLVideoProcessor"},
        "generation_config": GENERATION,
    }
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nQwen's own card.\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@contextmanager
def hub(folder: Path, model: str, revision: str, port: int = 0) -> Iterator[str]:
    """Serve the folder as this revision of this model; gives the address, for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = [
                {
                    "type": "file",
                    "path": file.name,
                    "rfilename": file.name,
                    "size": file.stat().st_size,
                    "oid": file.name,
                }
                for file in sorted(folder.iterdir())
            ]
            known = {
                f"/api/models/{model}/revision/{revision}": {"id": model, "sha": revision, "siblings": files},
                f"/api/models/{model}/tree/{revision}": files,
            }
            if path in known:
                return self.answer(json.dumps(known[path]).encode(), {})
            file = folder / path.removeprefix(f"/{model}/resolve/{revision}/")
            if file.parent != folder or not file.is_file():
                return self.send_error(404)
            content = file.read_bytes()
            return self.answer(content, {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

        def answer(self, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
