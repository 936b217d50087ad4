"""The page as one file: HTML, style, scripts, and the models inside.

A browser may run no script and load no style but those whose hashes stand in the page's policy, and nothing from
elsewhere (Content Security Policy).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
SCRIPTS = (
    "transformer.js", "tokenizer.js", "sampling.js", "weights.js", "elements.js", "local_model.js", "page_model.js",
    "server_model.js", "chat.js", "token_text.js", "roving.js", "token_strip.js", "next_token.js", "attention.js",
    "logit_lens.js", "glass.js", "chart.js", "runs.js", "page.js",
)  # fmt: skip
"""In the order in which each uses what is before it."""


@dataclass(frozen=True)
class Enclosed:
    """A model inside a page."""

    card: dict[str, Any]
    """From `page_card`."""
    finished: bytes
    """From `packed_model`."""
    snapshots: dict[int, bytes]
    """The same at steps of its training."""


def page(title: str, models: Sequence[Enclosed] = ()) -> str:
    """The HTML of the page; without models it asks the server that it comes from."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    guard = (_HERE / "guard.js").read_text(encoding="utf-8")
    allowed = f"script-src {_hash(guard)} {_hash(script)}; style-src {_hash(style)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    cards = [{**model.card, "snapshots": list(model.snapshots)} for model in models]
    policy += "" if models else "; connect-src 'self'"
    parts = {
        "policy": policy,
        "title": escape(title),
        "guard": guard,
        "style": style,
        "script": script,
        "models": "".join(_inside(place, model) for place, model in enumerate(models)),
        "cards": json.dumps(cards).replace("<", "\\u003c"),
    }
    html = (_HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], html)


def _inside(place: int, model: Enclosed) -> str:
    """The bytes of a model as text, which the browser does not run: it unpacks each when it is asked for."""
    return "".join(
        f'<script type="text/plain" id="model-{place}-{step}">{base64.b64encode(data).decode()}</script>\n'
        for step, data in [("finished", model.finished), *model.snapshots.items()]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
