"""How a server answers under load: requests and tokens a second, and how long its clients wait.

    tinylm serve out/quickstart/dpo
    python -m benchmarks.serve_load http://127.0.0.1:8000 [--clients 1 8 32] [--json load.json]

Each client asks again as soon as it is answered. The prompts are random words, so nothing of them is known to the
server yet, and the answers are drawn at temperature 1, as long as --answer_tokens allows, unless the model ends one
before. Times are a client's: from the opened connection to the first piece of text, and from one piece to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

WORDS = (
    "a about after all and are as at be but by can day do each find first for from give good had have he her him his "
    "how if in into is it know like long look made make many may me more my new no not now of on one or other out over "
    "people said see she so some take than that the their them then there they this time to two up use was water way "
    "we were what when which who will with word work would write year you your"
).split()


@dataclass
class Load:
    """What a number of clients measured."""

    clients: int
    requests: int
    seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """seconds to the first piece of text, by request"""
    gaps: list[float] = field(default_factory=list)
    """seconds between two pieces of text"""

    @property
    def figures(self) -> dict[str, float]:
        """The row of the table; times in milliseconds."""
        times = {"first": self.first, "gap": self.gaps}
        shares = {"p50": 0.5, "p99": 0.99}
        waits = {f"{n}_{s}_ms": 1000 * quantile(times[n], share) for n in times for s, share in shares.items()}
        speeds = {"requests_per_s": self.requests / self.seconds, "tokens_per_s": self.tokens / self.seconds}
        counts = {
            "clients": self.clients,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
        }
        return {**counts, **speeds, **waits}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of the values does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def ask(url: str, key: str, body: dict[str, object], load: Load) -> None:
    """One request, whose stream is read as it comes."""
    address = urlsplit(url)
    raw = json.dumps(body).encode()
    head = [
        f"POST {address.path.rstrip('/')}/v1/completions HTTP/1.1",
        f"Host: {address.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
        "Connection: close",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]
    begun = last = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    try:
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + raw)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-300:]}")
        is_first = True
        async for line in reader:  # lines without data belong to HTTP's chunks
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event["choices"] and event["choices"][0]["text"]:
                now = time.perf_counter()
                (load.first if is_first else load.gaps).append(now - (begun if is_first else last))
                is_first, last = False, now
            if event.get("usage"):
                load.tokens += event["usage"]["completion_tokens"]
                load.prompt_tokens += event["usage"]["prompt_tokens"]
    finally:
        writer.close()


async def measure(
    url: str, clients: int, requests: int, prompt_words: int, answer_tokens: int, model: str = "", key: str = ""
) -> Load:
    """So many clients at a time, until so many requests are answered."""
    load = Load(clients, requests)
    numbers = random.Random(clients)
    options = {"max_tokens": answer_tokens, "temperature": 1, "stream": True, "stream_options": {"include_usage": True}}
    bodies = [
        {"prompt": " ".join(numbers.choices(WORDS, k=prompt_words)), "model": model or None, **options}
        for _ in range(requests)
    ]

    async def client() -> None:
        while bodies:
            await ask(url, key, bodies.pop(), load)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = time.perf_counter() - begun
    return load


HEADINGS = {
    "clients": "clients", "requests_per_s": "requests/s", "tokens_per_s": "tokens/s",
    "first_p50_ms": "first token, p50 (ms)", "first_p99_ms": "p99", "gap_p50_ms": "next token, p50 (ms)",
    "gap_p99_ms": "p99 ",
}  # fmt: skip


def table(loads: Sequence[Load]) -> str:
    """The figures as a table in Markdown."""
    rows = ["| " + " | ".join(heading.strip() for heading in HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    for load in loads:
        figures = load.figures
        shown = [f"{figures[name]:,.0f}" if figures[name] >= 100 else f"{figures[name]:,.3g}" for name in HEADINGS]
        rows.append("| " + " | ".join(shown) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the server is, such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at a time")
    parser.add_argument("--requests", type=int, default=96, help="requests of all clients together; one asks a quarter")
    parser.add_argument(
        "--prompt_words", type=int, default=128, help="words of a prompt; a token or a little more each"
    )
    parser.add_argument("--answer_tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--model", default="", help="a name from /v1/models; by default the first")
    parser.add_argument("--api_key", default="", help="the server's key")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args()
    sizes = (given.prompt_words, given.answer_tokens, given.model, given.api_key)
    asyncio.run(measure(given.url, 2, 4, *sizes))  # what is done once is not measured
    counts = [given.requests if clients > 1 else max(1, given.requests // 4) for clients in given.clients]
    loads = [asyncio.run(measure(given.url, n, count, *sizes)) for n, count in zip(given.clients, counts, strict=True)]
    print(table(loads))
    if given.json:
        settings = {"prompt_words": given.prompt_words, "answer_tokens": given.answer_tokens}
        given.json.write_text(json.dumps({**settings, "loads": [load.figures for load in loads]}, indent=1))


if __name__ == "__main__":
    main()
