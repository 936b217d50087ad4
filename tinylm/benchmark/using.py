"""Using a model: decoding, prefill, evaluation.

A token costs 2 floating-point operations per weight that multiplies, and in decoding each step reads every weight once
for all streams together: memory bounds one stream, and matrix products bound many. Lookups in the table of embeddings
are free; a tied table multiplies in the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tinylm.benchmark import transformers_peer
from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, THEIRS, Figure, Work, take_turns
from tinylm.benchmark.settings import words
from tinylm.dataset import tinyworld
from tinylm.evaluation.bits_per_byte import text_loss
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import Runtime, seed_everything
from tinylm.tokenizer.tokenizer import Tokenizer


def generation_turn(engine: Engine, prompts: list[list[int]], max_new_tokens: int) -> Callable[[], float]:
    """Greedy generation of exactly `max_new_tokens` tokens for each prompt: no token stops it."""
    sampling = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)

    def turn() -> float:
        if len(prompts) == 1:
            return float(sum(1 for _ in engine.generate(prompts[0], sampling, stop_ids=())))
        return float(sum(len(answer) for answer in engine.generate_batch(prompts, sampling, stop_ids=())))

    return turn


def measure_decode(bench: Bench) -> Iterator[Figure]:
    """Greedy decoding, one stream and several; the time of the prompts counts, too."""
    settings = bench.settings
    for preset in settings.presets("decode"):
        config = settings.config(preset, settings.prompt_tokens + settings.max_new_tokens)
        for runtime in bench.runtimes:
            group = f"{shape_words(preset, config)}, {settings.prompt_tokens} + {settings.max_new_tokens} tokens"
            group = f"{group}, {bench.name_of(runtime)}"
            bench.say(f"decode: {group}")
            for streams in map(int, words(settings.streams)):
                samples = _generate(bench, config, runtime, streams, settings.prompt_tokens, settings.max_new_tokens)
                name = "1 stream" if streams == 1 else f"{streams} streams"
                work = decoding_work(config, runtime.compute_dtype, streams)
                yield Figure("decode", group, name, "tokens/s", samples, work)


def decoding_work(config: TinyLMConfig, dtype: torch.dtype, streams: int) -> Work:
    """Of a token: 2 N operations, and its stream's part of reading the weights."""
    weights = config.num_parameters()
    num_bytes = weights * dtype.itemsize / streams
    return Work(str(dtype).removeprefix("torch."), flops=2 * weights, num_bytes=num_bytes)


def measure_prefill(bench: Bench) -> Iterator[Figure]:
    """Reading a prompt, up to the first token of the answer; tokens per second are the prompt's."""
    settings, length = bench.settings, bench.settings.prefill_tokens
    for preset in settings.presets("prefill"):
        config = settings.config(preset, length + 1)
        for runtime in bench.runtimes:
            group = f"{shape_words(preset, config)}, {bench.name_of(runtime)}"
            bench.say(f"prefill: {group}")
            answers = _generate(bench, config, runtime, 1, length, 1)
            samples = {name: tuple(length * speed for speed in speeds) for name, speeds in answers.items()}
            work = Work(bench.name_of(runtime), flops=prefill_flops(config, length))
            yield Figure("prefill", group, f"{length:,} tokens", "tokens/s", samples, work)


def prefill_flops(config: TinyLMConfig, length: int) -> float:
    """Operations per token of a prompt: the head runs on the last token only; attention looks back at half of it."""
    table = config.vocab_size * config.hidden_size
    blocks = config.num_parameters() - table * (1 if config.tie_word_embeddings else 2)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_width * length / 2
    return 2 * blocks + 2 * table / length + attention


def _generate(
    bench: Bench, config: TinyLMConfig, runtime: Runtime, streams: int, prompt_tokens: int, max_new_tokens: int
) -> dict[str, tuple[float, ...]]:
    """Generated tokens per second of each contender."""
    seed_everything(0)
    ours = TinyLMForCausalLM(config).to(runtime.device).eval()
    prompts = torch.randint(3, config.vocab_size, (streams, prompt_tokens)).tolist()
    contenders = {OURS: generation_turn(Engine(ours, dtype=runtime.compute_dtype), prompts, max_new_tokens)}
    if bench.compares:
        theirs = transformers_peer.same_weights(ours).eval().to(runtime.compute_dtype)
        contenders[THEIRS] = transformers_peer.generation_turn(theirs, prompts, max_new_tokens)
    turns = take_turns(contenders, bench.settings.rounds, runtime)
    return {name: found.speeds for name, found in turns.items()}


def measure_evaluate(bench: Bench) -> Iterator[Figure]:
    """Bits per byte of held-out texts, as `tinylm eval` computes them."""
    settings, tokenizer = bench.settings, Tokenizer.default()
    texts = held_out_texts(settings.text_kb * 50)
    for preset in settings.presets("evaluate"):
        length, _ = settings.shape(preset)
        fields = {**vars(settings.config(preset, length)), "vocab_size": tokenizer.vocab_size}
        config = TinyLMConfig(**{**fields, "max_position_embeddings": length})
        for runtime in bench.runtimes:
            group = f"{shape_words(preset, config)}, contexts of {length:,}, {bench.name_of(runtime)}"
            bench.say(f"evaluate: {group}")
            seed_everything(0)
            model = TinyLMForCausalLM(config).to(runtime.device)

            def turn(model: TinyLMForCausalLM = model, runtime: Runtime = runtime) -> float:
                with runtime.autocast():
                    return float(text_loss(model, tokenizer, texts, tokenizer.document_start).num_tokens)

            turns = take_turns({OURS: turn}, settings.rounds, runtime)[OURS]
            mean_length = turns.amount / len(texts)
            work = Work(bench.name_of(runtime), flops=model.training_flops_per_token(mean_length) / 3)  # forwards only
            yield Figure("evaluate", group, "bits per byte", "tokens/s", {OURS: turns.speeds}, work)


def held_out_texts(num_bytes: int) -> list[str]:
    """Held-out documents of TinyWorld, this many bytes of them or a little more."""
    texts: list[str] = []
    size = number = 0
    while size < num_bytes:
        texts.append(tinyworld.pretrain_document(number, "test"))
        size, number = size + len(texts[-1].encode()), number + 1
    return texts


def shape_words(preset: str, config: TinyLMConfig) -> str:
    """The shape in words."""
    return f"{preset} {config.hidden_size}x{config.num_hidden_layers}, V={config.vocab_size:,}"
