"""A program that answers like vLLM, with the tiny student behind it, one request after another.

`program(folder)` writes it where compute.yaml's vllm.program can name it. STAND_IN says what it does wrong: "half"
ignores an adapter's part in the vision tower, "drops" forgets in its sleep what its adapters are.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def program(folder: Path, **variables: str) -> str:
    """The path of the program, with these variables in its environment."""
    file = folder / "vllm"
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    source = Path(__file__).parents[2] / "src"
    file.write_text(f'#!/bin/sh\nPYTHONPATH={source} {settings} exec {sys.executable} {__file__} "$@"\n')
    file.chmod(0o755)
    return str(file)


class Student:
    """The model of one server, with the adapters that it was given."""

    def __init__(self, base: str, dtype: str):
        from apprentice.student import loading

        self.model, self.processor = loading.load(base, dtype=dtype)
        self.adapters: dict[str, str] = {}
        self.dropped: set[str] = set()
        self.asleep = False
        self.lock = threading.Lock()

    def load(self, name: str, folder: str) -> None:
        from peft import PeftModel

        if name in self.adapters:
            raise ValueError(f"{name} is loaded already")
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, name).eval()
        self.adapters[name] = folder
        self.dropped.discard(name)
        if os.environ.get("STAND_IN") == "half":
            for at, layer in self.model.named_modules():
                if "visual" in at and name in getattr(layer, "scaling", {}):
                    layer.scaling[name] = 0.0

    def unload(self, name: str) -> None:
        if self.adapters.pop(name, None):
            self.model.delete_adapter(name)

    def sleep(self) -> None:
        self.asleep = True
        if os.environ.get("STAND_IN") == "drops":
            self.dropped = set(self.adapters)

    def reply(self, body: dict) -> dict:
        import numpy as np

        from apprentice.serving.in_process import generate
        from apprentice.student.encoding import encode_all

        assert not self.asleep, "it sleeps"
        name, model = body["model"], self.model
        if self.adapters:
            model.base_model.disable_adapter_layers() if name in ("base", *self.dropped) else model.set_adapter(name)
            if name not in ("base", *self.dropped):
                model.base_model.enable_adapter_layers()
            model = model.get_base_model()
        rows = encode_all(self.processor, [body["messages"]])
        draws = np.random.default_rng(body.get("seed", 0)).random((body.get("n", 1), body["max_tokens"]))
        found = generate(model, self.processor, rows * len(draws), draws, body["temperature"])
        choices = [
            {
                "message": {
                    "role": "assistant",
                    "content": self.processor.tokenizer.decode(ids, skip_special_tokens=True),
                },
                "token_ids": ids,
                "logprobs": {"content": [{"logprob": logprob} for logprob in logprobs]},
            }
            for ids, logprobs, _ in found
        ]
        return {"prompt_token_ids": rows[0].prompt_ids, "choices": choices}


def serve() -> None:
    arguments = sys.argv[1:]
    flags = dict(zip(arguments, arguments[1:], strict=False))
    print("started", os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"] or "none", flush=True)
    student = Student(arguments[1], flags["--dtype"])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            names = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in student.adapters)]
            self.answer({"data": names})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
            path = self.path.partition("?")[0].removeprefix("/v1")
            print(path, flush=True)
            with student.lock:
                try:
                    if path == "/chat/completions":
                        if body["model"] not in ("base", *student.adapters):
                            return self.answer({"message": "no such model"}, 404)
                        return self.answer(student.reply(body))
                    if path == "/load_lora_adapter":
                        student.load(body["lora_name"], body["lora_path"])
                    elif path == "/unload_lora_adapter":
                        student.unload(body["lora_name"])
                    elif path == "/sleep":
                        student.sleep()
                    elif path == "/wake_up":
                        student.asleep = False
                except Exception as error:
                    return self.answer({"message": repr(error)}, 500)
            return self.answer({})

        def answer(self, content, status=200):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments):
            pass

    ThreadingHTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    serve()
