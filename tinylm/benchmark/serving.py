"""Serving: the scheduler beside llama.cpp and transformers, and the bars that it should reach.

Every turn has new prompts, so that nothing of them is in a cache, except where the cache is measured.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tinylm.benchmark import transformers_peer
from tinylm.benchmark.bench import Bench
from tinylm.benchmark.figures import OURS, THEIRS, Bar, Figure, Turns, Work, take_turns
from tinylm.benchmark.llama_cpp_peer import FORMATS, NAMES, LlamaCpp
from tinylm.benchmark.settings import words
from tinylm.benchmark.using import decoding_work, prefill_flops, shape_words
from tinylm.export.gguf import export_gguf
from tinylm.generation.engine import Engine
from tinylm.generation.request import Request
from tinylm.generation.sampling import SamplingSettings
from tinylm.generation.scheduler import Scheduler, SchedulerSettings
from tinylm.model.kv_cache import KVCache
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.system.runtime import device_has_bf16, seed_everything
from tinylm.tokenizer.tokenizer import Tokenizer

ONE_STREAM_BARS = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.int8: 0.9}
"""Precision of the weights -> our speed over llama.cpp's, at least."""
MANY_STREAMS_BARS = {"llama.cpp": 1.0, THEIRS: 2.0}
PREFILL_BAR = 2.0
"""Over llama.cpp's best."""
FIRST_TOKEN_BAR, CACHED_FIRST_TOKEN_BAR = 0.2, 0.05
"""Seconds, at most."""
NEW_TOKENS = 10
"""Tokens of a prompt behind its cached prefix."""

Prompts = Callable[[], Sequence[list[int]]]
"""The prompts of a turn."""


@dataclasses.dataclass
class Contest:
    """One model, in the forms that the contenders need.

    Args:
        folder: for the GGUF files.
        dtypes: precisions of one stream; the last that the hardware multiplies in is that of everything else.
    """

    bench: Bench
    model: TinyLMForCausalLM
    folder: Path
    dtypes: list[torch.dtype]
    group: str

    def __post_init__(self) -> None:
        self.fastest = self.bench.runtimes[-1].compute_dtype
        self._peers: list[LlamaCpp] = []
        if self.bench.compares_llama_cpp:
            for kind in FORMATS.values():
                export_gguf(self.model, Tokenizer.default(), {}, self.folder / f"{kind}.gguf", kind)

    def prompts(self, number: int, length: int) -> list[list[int]]:
        """So many new prompts."""
        return torch.randint(3, self.model.config.vocab_size, (number, length)).tolist()

    def llama_cpp(self, dtype: torch.dtype, slots: int, context: int, reuses_prompts: bool = False) -> LlamaCpp:
        """llama.cpp with the format that is nearest to `dtype`."""
        peer = LlamaCpp(self.folder / f"{FORMATS[dtype]}.gguf", slots, context, reuses_prompts)
        self._peers.append(peer)
        return peer

    def scheduler(self, dtype: torch.dtype, streams: int, context: int) -> Scheduler:
        """Ours, with room for so many texts.

        It does not guess ahead: random weights repeat themselves, so nearly every guess would be right, and the speed
        one that no real text has. The others do not guess either.
        """
        model = Engine(self.model, dtype=dtype).compute_model
        size = streams * context * KVCache.bytes_per_token(model.config, model.dtype)
        return Scheduler(
            model, None, SchedulerSettings(streams, cache_bytes=size, context_length=context, draft_tokens=0)
        )

    def transformers_turn(self, dtype: torch.dtype, prompts: Prompts, num_tokens: int) -> dict[str, Callable]:
        """transformers' turn by its name, where it is measured and has this precision."""
        has_it = dtype == torch.float32 or (dtype == torch.bfloat16 and device_has_bf16(self.bench.device))
        if not (self.bench.compares and has_it):
            return {}
        theirs = transformers_peer.same_weights(self.model).eval().to(dtype)
        return {THEIRS: lambda: transformers_peer.generation_turn(theirs, list(prompts()), num_tokens)()}

    def take_turns(self, contenders: dict[str, Callable[[], float]]) -> dict[str, Turns]:
        """As `figures.take_turns`, with the rounds of the settings; then llama.cpp's processes end."""
        try:
            return take_turns(contenders, self.bench.settings.rounds, self.bench.runtimes[-1])
        finally:
            while self._peers:
                self._peers.pop().close()


def scheduler_turn(scheduler: Scheduler, prompts: Prompts, num_tokens: int) -> Callable[[], float]:
    """Greedy answers of exactly `num_tokens` to all prompts, submitted at once; returns how many tokens there were."""
    sampling = SamplingSettings(max_new_tokens=num_tokens, temperature=0.0)

    def turn() -> float:
        for prompt in prompts():
            scheduler.submit(Request(prompt, sampling))
        count = 0
        while scheduler.has_work:
            count += sum(len(event.token_ids) for event in scheduler.step())
        return float(count)

    return turn


def measure_serve(bench: Bench) -> Iterator[Figure]:
    """One stream in each precision, many streams, and the time to the first token."""
    settings, vocab_size = bench.settings, Tokenizer.default().vocab_size
    dtypes = [runtime.compute_dtype for runtime in bench.runtimes]
    if settings.precision == "auto" and bench.device.type == "cpu":
        dtypes = list(FORMATS)
    for preset in settings.presets("serve"):
        longest = max(settings.prompt_tokens + settings.max_new_tokens, settings.prefill_tokens + 1)
        config = dataclasses.replace(settings.config(preset, longest), vocab_size=vocab_size)
        seed_everything(0)
        model = TinyLMForCausalLM(config).to(bench.device).eval()
        with tempfile.TemporaryDirectory(prefix="tinylm-bench-") as folder:
            contest = Contest(bench, model, Path(folder), dtypes, shape_words(preset, config))
            for streams in map(int, words(settings.streams)):
                for dtype in dtypes if streams == 1 else [contest.fastest]:
                    yield _answering(contest, dtype, streams)
            yield from _first_token(contest)


def _answering(contest: Contest, dtype: torch.dtype, streams: int) -> Figure:
    """Tokens per second of so many texts at a time."""
    settings, config = contest.bench.settings, contest.model.config
    length, num_tokens = settings.prompt_tokens, settings.max_new_tokens
    name = f"{streams} stream{'s' * (streams > 1)}, {_words_of(dtype)}"
    contest.bench.say(f"serve: {contest.group}, {name}")

    def prompts() -> list[list[int]]:
        return contest.prompts(streams, length)

    scheduler = contest.scheduler(dtype, streams, length + num_tokens)
    contenders = {OURS: scheduler_turn(scheduler, prompts, num_tokens)}
    contenders |= contest.transformers_turn(dtype, prompts, num_tokens)
    bars = []
    if contest.bench.compares_llama_cpp:
        contenders[NAMES[dtype]] = contest.llama_cpp(dtype, streams, length + num_tokens).turn(prompts, num_tokens)
        bars.append(Bar(ONE_STREAM_BARS[dtype] if streams == 1 else MANY_STREAMS_BARS["llama.cpp"], NAMES[dtype]))
    if streams > 1 and THEIRS in contenders:
        bars.append(Bar(MANY_STREAMS_BARS[THEIRS], THEIRS))
    samples = {name: turns.speeds for name, turns in contest.take_turns(contenders).items()}
    group = f"{contest.group}, {length} + {num_tokens} tokens"
    return Figure("serve", group, name, "tokens/s", samples, decoding_work(config, dtype, streams), tuple(bars))


def _first_token(contest: Contest) -> Iterator[Figure]:
    """Seconds from a prompt to its first token, and tokens of the prompt per second."""
    length = contest.bench.settings.prefill_tokens
    contest.bench.say(f"serve: {contest.group}, the first token after {length:,}")
    group = f"{contest.group}, a prompt of {length:,} tokens, {_words_of(contest.fastest)}"
    cold = _turns_to_first_token(contest, lambda: contest.prompts(1, length), reuses_prompts=False)
    peers = [name for name in cold if name in NAMES.values()]
    speeds = {name: tuple(length / seconds for seconds in turns.seconds) for name, turns in cold.items()}
    work = Work(_words_of(contest.fastest), flops=prefill_flops(contest.model.config, length))
    bars = tuple(Bar(PREFILL_BAR, name) for name in peers)
    yield Figure("serve", group, "reading", "tokens/s", speeds, work, bars)
    seconds = {name: turns.seconds for name, turns in cold.items()}
    yield Figure("serve", group, "first token", "s", seconds, bars=(Bar(FIRST_TOKEN_BAR),))
    prefix = contest.prompts(1, max(1, length - NEW_TOKENS))[0]
    cached = _turns_to_first_token(contest, lambda: [prefix + contest.prompts(1, NEW_TOKENS)[0]], reuses_prompts=True)
    seconds = {name: turns.seconds for name, turns in cached.items()}
    yield Figure("serve", group, f"all but {NEW_TOKENS} cached", "s", seconds, bars=(Bar(CACHED_FIRST_TOKEN_BAR),))


def _turns_to_first_token(contest: Contest, prompts: Prompts, reuses_prompts: bool) -> dict[str, Turns]:
    """One token after one prompt; the first round, which does not count, fills the caches."""
    context = len(prompts()[0]) + 1
    contenders = {OURS: scheduler_turn(contest.scheduler(contest.fastest, 1, context), prompts, 1)}
    if not reuses_prompts:
        contenders |= contest.transformers_turn(contest.fastest, prompts, 1)
    if contest.bench.compares_llama_cpp:
        for dtype in FORMATS:
            contenders[NAMES[dtype]] = contest.llama_cpp(dtype, 1, context, reuses_prompts).turn(prompts, 1)
    return contest.take_turns(contenders)


def _words_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
