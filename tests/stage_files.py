"""Small files in the shapes that users bring, for tests that run whole stages."""

from __future__ import annotations

import json
from pathlib import Path

from tinylm.dataset import tinyworld


def write_stage_files(folder: Path, num_chats: int = 40, num_pairs: int = 24) -> None:
    """texts.jsonl, chats.jsonl and pairs.jsonl."""
    texts = [{"text": text} for text in tinyworld.pretrain_documents(60, "train")]
    chats = [{"messages": list(item.messages)} for item in tinyworld.conversations(num_chats, "train")]
    pairs = [
        {"prompt": list(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in tinyworld.preference_pairs(num_pairs, "train")
    ]
    for name, records in (("texts", texts), ("chats", chats), ("pairs", pairs)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
