"""OpenVINO GenAI's continuous batching behind the paths that tools/serve_load.py asks.

    PEER/bin/python tools/openvino_server.py MODEL_FOLDER --port 8090

PEER is the environment that `make peers-test` or a run with the peer `openvino` has made, and
MODEL_FOLDER what `optimum-cli export openvino` wrote. One thread steps the pipeline; each request
has a thread that writes its stream. Requests are greedy. Nothing here is for production.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openvino_genai


class Stepper:
    """Steps the pipeline while it has requests, and hands out their tokens."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._changed = threading.Condition()
        self._begun: list[tuple[Any, queue.Queue[list[int] | None]]] = []
        self._numbers = itertools.count()

    def ask(self, prompt: str, tokens: int) -> queue.Queue[list[int] | None]:
        """Begin a request: the queue gets its tokens, and then None."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.apply_chat_template = tokens, False, False
        answer: queue.Queue[list[int] | None] = queue.Queue()
        with self._changed:
            handle = self._pipeline.add_request(next(self._numbers), prompt, config)
            self._begun.append((handle, answer))
            self._changed.notify()
        return answer

    def run(self) -> None:
        """Step for ever."""
        active: list[tuple[Any, queue.Queue[list[int] | None]]] = []
        while True:
            with self._changed:
                while not (self._begun or active):
                    self._changed.wait()
                active, self._begun = active + self._begun, []
            self._pipeline.step()
            active = [one for one in active if not _passed_on(*one)]


def _passed_on(handle: Any, answer: queue.Queue[list[int] | None]) -> bool:
    """Hand out a request's new tokens; whether it has ended."""
    while handle.can_read():
        for output in handle.read().values():
            answer.put(list(output.generated_ids))
    if handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
        return False
    answer.put(None)
    return True


class Handler(BaseHTTPRequestHandler):
    """The two paths."""

    protocol_version = "HTTP/1.1"
    stepper: Stepper
    tokenizer: Any

    def do_GET(self) -> None:
        """The list of models."""
        body = json.dumps({"data": [{"id": "openvino"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """A completion or a chat, streamed."""
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = fields.get("messages")
        prompt = fields.get("prompt")
        if messages is not None:
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        count = len(self.tokenizer.encode(prompt).input_ids.data[0])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        answer = self.stepper.ask(prompt, fields["max_tokens"])
        new = 0
        while (tokens := answer.get()) is not None:
            new += len(tokens)
            text = self.tokenizer.decode(tokens)
            self._send({"choices": [{"text": text, "delta": {"content": text}}]})
        self._send({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": new}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """No line for each request."""

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def main() -> None:
    """Load the model and answer until the program is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batched-tokens", type=int, default=256, help="of one step")
    parser.add_argument("--cache-gb", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_batched_tokens = options.batched_tokens
    scheduler.max_num_seqs = options.rows
    scheduler.cache_size = options.cache_gb
    properties = {"INFERENCE_NUM_THREADS": options.threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        options.folder, scheduler, "CPU", properties
    )
    Handler.stepper, Handler.tokenizer = Stepper(pipeline), pipeline.get_tokenizer()
    threading.Thread(target=Handler.stepper.run, daemon=True).start()
    print(f"http://127.0.0.1:{options.port}", flush=True)
    ThreadingHTTPServer.request_queue_size = 128  # connections that wait; 5 are too few
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
