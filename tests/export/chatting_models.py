"""A tiny model that has learnt four answers by heart and stops after each, and an adapter for it, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tests.model.small_models import trained_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import save_model
from tinylm.model.lora import PROJECTIONS, LoRAConfig, apply_lora, unload_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.chat_template import encode_chat
from tinylm.tokenizer.tokenizer import Tokenizer

QUESTIONS = ("Who are you?", "Größe?", "你好", "How is the sea?")
ANSWERS = ("I am the ant, naïve.", "  größer als ½", "мир 你好吗", "quiet")
OTHER_ANSWERS = (*ANSWERS[1:], ANSWERS[0])
"""Of the same tokens: an adapter cannot teach tokens that the model never met."""


def messages_of(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    user = {"role": "user", "content": question}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


@torch.enable_grad()
def learn(model: TinyLMForCausalLM, tokenizer: Tokenizer, answers: tuple[str, ...], rate: float) -> None:
    """Until it knows the answers."""
    chats = [encode_chat(tokenizer, messages_of(*pair)) for pair in zip(QUESTIONS, answers, strict=True)]
    longest = max(len(ids) for ids, _ in chats)
    rows = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chats])
    learnt = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in chats])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(150):
        loss = cross_entropy(model(rows[:, :-1])[learnt[:, 1:]], rows[:, 1:][learnt[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return
    raise AssertionError(f"loss {loss.item()}")


def write_models(
    folder: Path, tokenizer: Tokenizer, targets: tuple[str, ...] = PROJECTIONS, **shape: Any
) -> tuple[Path, Path]:
    """(full_sft_64_epoch0, lora_64_epoch0) in `folder`; the adapter, of `targets`, gives the other answers."""
    torch.manual_seed(3)
    model = trained_model(vocab_size=tokenizer.vocab_size, **shape).train()
    learn(model, tokenizer, ANSWERS, 3e-3)
    base, adapter = folder / "full_sft_64_epoch0", folder / "lora_64_epoch0"
    facts = {"tokenizer_fingerprint": tokenizer.fingerprint, "document_start": True}
    save_model(base, model.eval(), tokenizer, {"stage": "full_sft", **facts, "parent": None, "seed": 3})
    apply_lora(model, LoRAConfig(rank=8, alpha=32, target_modules=targets))
    learn(model, tokenizer, OTHER_ANSWERS, 1e-2)
    save_adapter(model, adapter, base, {"stage": "lora", **facts, "parent": {"path": str(base)}, "seed": 4})
    unload_lora(model)
    return base, adapter
