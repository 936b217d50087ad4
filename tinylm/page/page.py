"""The page as one file: HTML, style, scripts, and the model inside.

A browser may run no script and load no style but those whose hashes stand in the page's policy, and nothing from
elsewhere (Content Security Policy).
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from pathlib import Path

_HERE = Path(__file__).parent
SCRIPTS = (
    "transformer.js", "tokenizer.js", "sampling.js", "weights.js", "elements.js", "local_model.js", "chat.js",
    "glass.js", "server_model.js", "runs.js", "page.js",
)  # fmt: skip
"""In the order in which each uses what is before it."""


def page(title: str, model: bytes = b"") -> str:
    """The HTML of the page.

    Args:
        model: from `packed_model`; without one, the page asks the server that it comes from.
    """
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    guard = (_HERE / "guard.js").read_text(encoding="utf-8")
    allowed = f"script-src {_hash(guard)} {_hash(script)}; style-src {_hash(style)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    policy += "" if model else "; connect-src 'self'"
    parts = {
        "policy": policy,
        "title": escape(title),
        "guard": guard,
        "style": style,
        "script": script,
        "model": base64.b64encode(model).decode(),
    }
    html = (_HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], html)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
