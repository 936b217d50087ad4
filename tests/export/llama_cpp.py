"""llama.cpp in this process, as the tests ask it: tokens of a text, a rendered chat, log-probabilities, greedy tokens.

xllamacpp is llama.cpp and its server as one Python package. Here it computes on one thread, with its keys and values in
float32, so that only the order of additions differs from ours.
"""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch import Tensor

from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer


class LlamaCpp:
    """A GGUF file, loaded; with a second file as its adapter if one is given."""

    def __init__(self, model: Path, adapter: Path | None = None, num_positions: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            params.lora_adapters = [lora]
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cache_ram_mib = num_positions, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)
        # A server that is destroyed before its loop runs waits for ever; one that has answered is past that.
        self._complete([0], n_predict=1)

    def _post(self, route: str, content: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(content).encode("utf-8")
        request = urllib.request.Request(
            f"{self.server.listening_address}/{route}", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        options = {"add_special": add_special, "parse_special": parse_special}
        return self._post("tokenize", {"content": text, **options})["tokens"]

    def chat_tokens(self, messages: list[dict[str, Any]], **more: Any) -> list[int]:
        """What a chat completion reads: the chat through the template in the file, then the tokens of that text."""
        prompt = self._post("apply-template", {"messages": messages, **more})["prompt"]
        return self.tokens(prompt, add_special=True, parse_special=True)

    def _complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        return self._post("completion", {"prompt": ids, "temperature": 0.0, "ignore_eos": True, **options})

    def next_logprobs(self, ids: list[int], vocab_size: int) -> Tensor:
        """[V]: the log-probability of every token after `ids`."""
        # The server says nothing about a token that is half a character, so it has to choose another one: "a".
        answer = self._complete(ids, n_predict=1, n_probs=vocab_size, logit_bias=[["a", 1000.0]])
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        logprobs = torch.full((vocab_size,), math.nan)
        for entry in entries:
            logprobs[entry["id"]] = entry["logprob"]
        assert logprobs.isfinite().all()
        return logprobs

    def greedy(self, ids: list[int], num_tokens: int = 64) -> list[int]:
        """The likeliest tokens, without those that end a text."""
        return self._complete(ids, n_predict=num_tokens, return_tokens=True)["tokens"]


def next_logprobs(model: TinyLMForCausalLM, ids: list[int]) -> Tensor:
    """Ours."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]))[0, -1].double(), dim=-1).float()


def greedy(model: TinyLMForCausalLM, ids: list[int], num_tokens: int = 64) -> list[int]:
    """Ours, without a cache; of all tokens but those that end a text."""
    all_ids = list(ids)
    for _ in range(num_tokens):
        logprobs = next_logprobs(model, all_ids)
        logprobs[[0, 2]] = -math.inf
        all_ids.append(int(logprobs.argmax()))
    return all_ids[len(ids) :]


def bits_per_byte(llama_cpp: LlamaCpp, tokenizer: Tokenizer, texts: list[str], start: list[int]) -> float:
    """How well llama.cpp predicts texts; each begins with the ids `start`, which are not predicted."""
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = start + tokenizer.encode(text)
        for place in range(max(len(start), 1), len(ids)):
            nats -= float(llama_cpp.next_logprobs(ids[:place], tokenizer.vocab_size)[ids[place]])
            num_bytes += len(tokenizer.token_bytes(ids[place]))
    return nats / math.log(2) / num_bytes
