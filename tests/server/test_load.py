"""The load test measures what it says."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from benchmarks import serve_load
from tests.server.serving import running, settings_for, slowed


def test_its_table(server, tmp_path, monkeypatch, capsys):
    file = tmp_path / "load.json"
    words = [server.url, "--clients", "1", "3", "--requests", "8", "--prompt_words", "9", "--answer_tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["serve_load", *words, "--json", str(file)])
    serve_load.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    loads = json.loads(file.read_text())["loads"]
    assert [(load["clients"], load["requests"]) for load in loads] == [(1, 2), (3, 8)]
    assert 8 < loads[1]["tokens"] <= 40 and loads[1]["tokens_per_s"] > loads[1]["requests_per_s"] > 0
    assert 0 < loads[0]["first_p50_ms"] <= loads[0]["first_p99_ms"]


def test_its_times_are_the_servers(server):
    with slowed(server, 0.05):
        load = asyncio.run(serve_load.measure(server.url, 2, 2, 9, 6))
    assert load.prompt_tokens >= 18 and load.tokens <= 12
    assert all(0.05 <= seconds < 2 for seconds in load.first) and len(load.first) == 2
    assert min(load.gaps) > 0.03 and load.seconds >= 0.3


def test_refusals_are_errors(model_folder):
    with running(settings_for(model_folder, api_key="geheim")) as locked:
        with pytest.raises(RuntimeError, match="401"):
            asyncio.run(serve_load.measure(locked.url, 1, 1, 9, 6))
        assert asyncio.run(serve_load.measure(locked.url, 1, 1, 9, 6, "tiny", "geheim")).tokens == 6


def test_quantiles():
    assert serve_load.quantile([3, 1, 2], 0.5) == 2 and serve_load.quantile([], 0.5) == 0
    assert serve_load.quantile(list(range(100)), 0.99) == 99 and serve_load.quantile([5], 0.99) == 5
