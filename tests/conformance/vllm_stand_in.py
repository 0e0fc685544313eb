"""A stand-in for `vllm serve`, which needs gigabytes and a GPU: its options, its API and its chunks, without a model.

Written after vLLM 0.32 (entrypoints/openai, entrypoints/serve, entrypoints/pooling, renderers/params.py). It answers
with the last user's words in capitals, a token each; ids of tokens are bytes. What it is asked is in `seen.jsonl` in
the model's folder, where `stand_in.json` may say how it starts. These words in a prompt make it do something else:

SLOW a word every 50 ms, without end · DIE is killed after a word · BUSY, BROKEN are refused with 503, 500 ·
LATER breaks in the stream · CALL answers with a call in Hermes' form · HALF sends a token that is no text yet
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENDLESS = 100_000


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--runner", choices=["auto", "generate", "pooling"], default="auto")
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--uvicorn-log-level", default="info")
    parser.add_argument("--chat-template")
    parser.add_argument("--lora-modules", nargs="+", default=[])
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--speculative-config", type=json.loads)
    for flag in ("--enforce-eager", "--enable-lora", "--enable-auto-tool-choice", "--enable-prompt-tokens-details",
                 "--disable-uvicorn-access-log", "--enable-log-requests", "--enable-prefix-caching"):  # fmt: skip
        parser.add_argument(flag, action=argparse.BooleanOptionalAction)
    return parser.parse_args(argv)


def say(level: str, text: str) -> None:
    print(f"(APIServer pid={os.getpid()}) {level} 11-30 12:00:00 [api_server.py:1] {text}", flush=True)


class Refused(Exception):
    def __init__(self, code: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StandIn:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.model)
        self.loras = dict(module.split("=", 1) for module in args.lora_modules)
        self.running = 0
        self._lock = threading.Lock()

    def note(self, **what: Any) -> None:
        with self._lock, (self.folder / "seen.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def check_model(self, body: dict[str, Any]) -> None:
        name = body.get("model")
        if name is not None and name not in (*self.args.served_model_name, *self.loras):
            raise Refused(404, "NotFoundError", f"The model `{name}` does not exist.", "model")

    def check_length(self, count: int) -> None:
        most = self.args.max_model_len
        if count > most:
            raise Refused(
                400,
                "BadRequestError",
                f"This model's maximum context length is {most} tokens. However, your prompt contains {count} input "
                "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
                "input prompt.",
                "input_tokens",
            )


def rendered(body: dict[str, Any]) -> str:
    """The chat template: it shows tools as JSON, and knows one variable."""
    lines = [f"<|tools|>{json.dumps(body['tools'])}"] if body.get("tools") else []
    lines += [f"<|{message['role']}|>{message.get('content') or ''}" for message in body["messages"]]
    if (body.get("chat_template_kwargs") or {}).get("enable_thinking"):
        lines.append("<|think|>")
    return "\n".join([*lines, "<|assistant|>"])


def instance(schema: dict[str, Any]) -> Any:
    """Something that the schema allows."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return instance(schema["anyOf"][0])
    match schema.get("type", "object"):
        case "object":
            return {name: instance(inner) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [instance(schema["items"]) for _ in range(max(schema.get("minItems", 0), 1))]
        case "integer" | "number":
            return 21
        case "boolean":
            return True
        case _:
            return 'Par"is'


def answer_of(prompt: str, body: dict[str, Any]) -> Iterator[str]:
    """Tokens."""
    wanted = body.get("response_format") or {}
    if wanted.get("type") in ("json_schema", "json_object"):
        schema = (wanted.get("json_schema") or {}).get("schema", {"properties": {"a": {"type": "integer"}}})
        text = json.dumps(instance(schema))
        yield from (text[at : at + 4] for at in range(0, len(text), 4))
    elif "CALL" in prompt:
        yield from (
            "Let me see. ",
            "<tool_",
            'call>{"name": "weather", ',
            '"arguments": {"city": "Paris"}}</tool_call>',
        )
    elif "SLOW" in prompt:
        for i in range(ENDLESS):
            time.sleep(0.05)
            yield f" {i}"
    else:
        for i, word in enumerate(prompt.split()):
            yield ("" if i == 0 else " ") + word.upper()
            if i == 1 and "DIE" in prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if i == 1 and "LATER" in prompt:
                raise Refused(500, "InternalServerError", "Internal server error")
            if "HALF" in prompt:
                yield ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        stand_in = self.stand_in
        if self.path == "/health":
            self._send(200, b"")
        elif self.path == "/metrics":
            labels = f'engine="0",model_name="{stand_in.args.served_model_name[0]}"'
            usage = min(stand_in.running * 0.25, 1.0)
            text = (
                "# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.\n"
                "# TYPE vllm:kv_cache_usage_perc gauge\n"
                f"vllm:kv_cache_usage_perc{{{labels}}} {usage}\n"
                f"vllm:num_requests_running{{{labels}}} {float(stand_in.running)}\n"
            )
            self._send(200, text.encode(), "text/plain")
        else:
            self._send(404, b'{"detail":"Not Found"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stand_in = self.stand_in
        given = self.headers.get("Authorization", "").encode()
        if self.path.startswith("/v1") and not hmac.compare_digest(
            given, f"Bearer {os.environ['VLLM_API_KEY']}".encode()
        ):
            self._send(401, b'{"error": "Unauthorized"}')
            return
        stand_in.note(path=self.path, body=body)
        try:
            stand_in.check_model(body)
            getattr(self, "post_" + self.path.strip("/").replace("/", "_"))(body)
        except Refused as refused:
            self._send(refused.code, json.dumps(refused.body).encode())

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, said: Any) -> None:
        self._send(200, json.dumps(said).encode())

    # Streams

    def post_v1_chat_completions(self, body: dict[str, Any]) -> None:
        args = self.stand_in.args
        if body.get("tool_choice") == "auto" and not (args.enable_auto_tool_choice and args.tool_call_parser):
            raise Refused(
                400,
                "BadRequestError",
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            )
        last = [message for message in body["messages"] if message["role"] == "user"][-1]["content"]
        self._stream(body, rendered(body), last, chat=True)

    def post_v1_completions(self, body: dict[str, Any]) -> None:
        prompt = body["prompt"]
        if isinstance(prompt, list):
            prompt = bytes(prompt).decode()
        self._stream(body, prompt, prompt, chat=False)

    def _stream(self, body: dict[str, Any], prompt: str, asked: str, *, chat: bool) -> None:
        assert body["stream"]
        assert body["n"] == 1 if "n" in body else True
        prompt_tokens = len(prompt.split())
        self.stand_in.check_length(prompt_tokens)
        if "BUSY" in asked:
            raise Refused(
                503,
                "Service Unavailable",
                "The engine is currently busy and cannot accept new requests. Please try again later or on a "
                "different instance.",
            )
        if "BROKEN" in asked:
            raise Refused(500, "InternalServerError", "EngineCore encountered an issue.")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + "0123456789abcdef",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1_800_000_000,
            "model": body["model"],
        }
        options = body.get("stream_options") or {}

        def event(choice: dict[str, Any], count: int) -> None:
            self._gone()
            said = {**head, "choices": [choice]}
            if options.get("continuous_usage_stats"):
                said["usage"] = _usage(prompt_tokens, count)
            self._event(json.dumps(said))

        self.stand_in.running += 1
        count = 0
        try:
            if chat:
                delta = {"role": "assistant", "content": ""}
                event({"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}, 0)
            if chat and body.get("tools") and body.get("tool_choice") == "auto" and "weather" in asked:
                count = self._call(event)
                finish = "tool_calls"
            else:
                count, finish = self._words(event, body, asked, chat=chat)
            if options.get("include_usage"):
                usage = _usage(prompt_tokens, count)
                if self.stand_in.args.enable_prompt_tokens_details:
                    usage["prompt_tokens_details"] = {"cached_tokens": 1}
                self._event(json.dumps({**head, "choices": [], "usage": usage}))
            del finish
        except Refused as refused:
            self._event(json.dumps(refused.body))
        except (BrokenPipeError, ConnectionResetError):
            self.stand_in.note(closed=asked)
            self.close_connection = True
            return
        finally:
            self.stand_in.running -= 1
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _words(self, event: Any, body: dict[str, Any], asked: str, *, chat: bool) -> tuple[int, str]:
        most = body.get("max_tokens") or (ENDLESS if chat else 16)
        tokens = answer_of(asked, body)
        prefix = f"[{body['model']}] " if body["model"] in self.stand_in.loras else ""
        stops = body.get("stop") or []
        count, last = 0, next(tokens, None)
        while last is not None:
            token, last = prefix + last, next(tokens, None) if count + 1 < most else None
            prefix = ""
            count += 1
            stopped = next((stop for stop in stops if stop in token), None)
            if stopped is not None:
                token, last = token[: token.index(stopped)], None
            finish = None if last is not None else "length" if count >= most and stopped is None else "stop"
            choice: dict[str, Any] = {"index": 0, "logprobs": _logprobs(body, token, chat=chat)}
            choice |= {"delta": {"content": token}} if chat else {"text": token}
            choice["finish_reason"] = finish
            if finish is not None:
                choice["stop_reason"] = stopped
            event(choice, count)
        return count, "stop"

    def _call(self, event: Any) -> int:
        function = {"name": "weather", "arguments": ""}
        pieces = [
            {"index": 0, "id": "chatcmpl-tool-0123", "type": "function", "function": function},
            {"index": 0, "function": {"arguments": '{"city": '}},
            {"index": 0, "function": {"arguments": '"Paris"}'}},
        ]
        for count, piece in enumerate(pieces, 1):
            finish = "tool_calls" if count == len(pieces) else None
            event({"index": 0, "delta": {"tool_calls": [piece]}, "logprobs": None, "finish_reason": finish}, count)
        return len(pieces)

    def _event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _gone(self) -> None:
        """Starlette sees a client leave although nothing is sent."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    # Answers that are no streams

    def post_tokenize(self, body: dict[str, Any]) -> None:
        tokens = list((rendered(body) if "messages" in body else body["prompt"]).encode())
        most = self.stand_in.args.max_model_len
        self._json({"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": None})

    def post_detokenize(self, body: dict[str, Any]) -> None:
        self._json({"prompt": bytes(body["tokens"]).decode()})

    def post_v1_embeddings(self, body: dict[str, Any]) -> None:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = [
            {"index": i, "object": "embedding", "embedding": [float(len(text)), 0.5, -1.0]}
            for i, text in enumerate(texts)
        ]
        count = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}
        said = {"id": "embd-0", "object": "list", "created": 1, "model": body["model"], "data": data[::-1]}
        self._json({**said, "usage": usage})

    def post_v1_rerank(self, body: dict[str, Any]) -> None:
        wanted = set(body["query"].split())
        scores = [len(wanted & set(text.split())) / len(wanted) for text in body["documents"]]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        results = [
            {"index": i, "document": {"text": body["documents"][i]}, "relevance_score": scores[i]} for i in order
        ]
        count = sum(len(text.split()) for text in body["documents"])
        usage = {"prompt_tokens": count, "total_tokens": count}
        self._json({"id": "rerank-0", "model": body["model"], "usage": usage, "results": results})


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def _logprobs(body: dict[str, Any], token: str, *, chat: bool) -> dict[str, Any] | None:
    other = "<other>"
    if chat and body.get("logprobs"):
        tops = [(token, -0.25), (other, -1.5)][: body["top_logprobs"]]
        entries = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in tops]
        return {"content": [{"token": token, "logprob": -0.25, "bytes": list(token.encode()), "top_logprobs": entries}]}
    if not chat and body.get("logprobs") is not None:
        tops = dict([(token, -0.25), (other, -1.5)][: body["logprobs"] + 1])
        return {"text_offset": [0], "token_logprobs": [-0.25], "tokens": [token], "top_logprobs": [tops]}
    return None


class Server(ThreadingHTTPServer):
    address_family = socket.AF_UNIX
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.RequestHandlerClass(request, ("", 0), self)  # a Unix socket has no address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def main() -> None:
    args = options(sys.argv[1:])
    stand_in = StandIn(args)
    how_file = stand_in.folder / "stand_in.json"
    how = json.loads(how_file.read_text()) if how_file.exists() else {}
    engine = subprocess.Popen(["sleep", "600"])  # as vLLM's EngineCore: a process that it must not leave behind
    asked = {name: value for name, value in vars(args).items() if value is not None}
    stand_in.note(pid=os.getpid(), engine=engine.pid, argv=sys.argv[1:], options=asked, key=os.environ["VLLM_API_KEY"],
                  gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), offline=os.environ.get("HF_HUB_OFFLINE"))  # fmt: skip
    say("INFO", f"vLLM API server version 0.32.0, serving {args.model}")
    say("WARNING", "this is a stand-in")
    if "fail" in how:
        say("ERROR", how["fail"])
        sys.exit(1)
    Handler.stand_in = stand_in
    server = Server(args.uds, Handler, bind_and_activate=False)
    server.server_bind()  # vLLM binds before it loads, and listens when it has
    time.sleep(how.get("start_s", 0.1))
    server.server_activate()
    say("INFO", "Application startup complete.")
    signal.signal(signal.SIGTERM, lambda *_: (engine.terminate(), os._exit(0)))
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
