"""``transformers serve``, started as a user starts it: an OpenAI client gets the tokens of ``generate``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked_python
import fresh_python
import hf_support
import pytest
from hf_support import DEVICE, KERNELS, SHAPED, build_causal_lm, save_word_tokenizer
from transformers.utils import import_utils

pytestmark = [
    hf_support.needs_kernel,
    pytest.mark.skipif(
        not getattr(import_utils, "is_serve_available", lambda: False)(), reason="needs transformers[serving]"
    ),
]
ROOT = Path(__file__).parent.parent
PROGRAM = "transformers.cli.transformers"
START_SECONDS, ANSWER_SECONDS = 180, 120
NEW_TOKENS = 8
PROMPTS = [
    "w5 w6 w7",
    " ".join(f"w{3 + 7 * i % 87}" for i in range(41)),
    "w9",
    " ".join(f"w{i}" for i in range(20, 37)),
]


class Server:
    """``transformers serve`` in a process of its own, which never imports this package; ended when the block is left.
    ``is_fresh``: as a user starts it, otherwise in a fork that has torch's modules (forked_python.py), if it needs no GPU."""

    def __init__(self, folder: Path, model: Path, *arguments: str, is_fresh: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.model = folder / "log", model
        self.arguments = [
            "serve", str(model), "--attn-implementation", SHAPED, "--device", str(DEVICE), "--host", "127.0.0.1",
            "--port", str(self.port), *arguments,
        ]  # fmt: skip
        self.path, self.is_fresh = (
            [fresh_python.entry_point_folder(folder), str(ROOT)],
            is_fresh or DEVICE.type != "cpu",
        )
        environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
        self.environment = environment | {
            "PYTHONPATH": os.pathsep.join([*self.path, os.environ.get("PYTHONPATH", "")]),
            "FLASHMLA_LOG": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def __enter__(self):
        if self.is_fresh:
            command = [sys.executable, "-m", PROGRAM, *self.arguments]
            with self.log.open("w") as log:
                self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        else:
            program = f"import runpy; runpy.run_module({PROGRAM!r}, run_name='__main__', alter_sys=True)"
            self.process = forked_python.Process(
                program, self.log.parent, self.path, self.environment, *self.arguments, said=self.log,
                limit=START_SECONDS + ANSWER_SECONDS,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def _wait(self):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                direct.open(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"no server after {START_SECONDS} seconds at most:\n{self.log.read_text()[-4000:]}")

    def ask(self, text: str, stream: bool = False) -> str:
        import openai

        with openai.DefaultHttpxClient(trust_env=False) as transport:  # no proxy between two ends of one machine
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0,
                http_client=transport,
            )  # fmt: skip
            answer = client.chat.completions.create(
                model=str(self.model), messages=[{"role": "user", "content": text}], max_tokens=NEW_TOKENS,
                temperature=0.0, stream=stream,
            )  # fmt: skip
            if stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
            return answer.choices[0].message.content


@pytest.mark.parametrize(
    ("family", "options", "arguments"),
    [
        ("Llama", {}, ()),
        ("Llama", {}, ("--continuous-batching",)),
        ("Mistral", {"sliding_window": 5}, ("--continuous-batching",)),
    ],
    ids=["generate", "continuous batching", "continuous batching, sliding window"],
)
def test_a_client_gets_the_tokens_of_generate(family, options, arguments, tmp_path):
    model = tmp_path / "model"
    tokenizer = save_word_tokenizer(model)
    eager = build_causal_lm("eager", family, **options)
    eager.save_pretrained(model)
    want = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(DEVICE)
        tokens = eager.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        want.append(tokenizer.decode(tokens))
    assert len(set(want)) == len(want), "prompts of one answer prove little"
    if arguments:
        arguments += ("--cb-num-blocks", "8", "--cb-max-batch-tokens", "32", "--no-cb-use-cuda-graph")
    with Server(tmp_path, model, *arguments, is_fresh=not arguments) as server:
        assert [server.ask(prompt) for prompt in PROMPTS] == want, "one after another"
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(server.ask, PROMPTS)) == want, "together"
        assert server.ask(PROMPTS[0], stream=True) == want[0], "streamed"
    chosen = [line for line in server.log.read_text().splitlines() if line.startswith("q[") and " -> " in line]
    names = {line.split(" -> ")[1].split()[0] for line in chosen}
    assert names, "no call of this package"
    assert names <= {*KERNELS}, chosen


def test_the_name_that_serve_does_not_take_is_refused_at_once(tmp_path):
    model = tmp_path / "model"
    save_word_tokenizer(model)
    build_causal_lm("eager").save_pretrained(model)
    server = Server(tmp_path, model)
    server.arguments[server.arguments.index(SHAPED)] = "flashmla"
    with pytest.raises(AssertionError, match="Unsupported attention implementation: 'flashmla'"), server:
        pass


@pytest.mark.any_release
def test_the_documented_command_is_the_one_that_is_tested():
    command = f"transformers serve MODEL --attn-implementation {SHAPED} --continuous-batching"
    assert f"```bash\n{command}\n```" in (ROOT / "docs" / "inference.md").read_text()
