"""The Modelfile of Ollama: which file to run, how a chat becomes a prompt, when to stop, how to draw.

Described at https://docs.ollama.com/modelfile; the template is in Go's template language.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylm.generation.sampling import SamplingSettings
from tinylm.model.config import TinyLMConfig
from tinylm.tokenizer.tokenizer import Tokenizer

_CHAT = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def is_base_model(tokenizer: Tokenizer, lineage: dict[str, Any]) -> bool:
    """Whether the model continues texts and knows no chats."""
    return lineage.get("stage") == "pretrain" or not tokenizer.can_chat


def modelfile(model: Path, config: TinyLMConfig, tokenizer: Tokenizer, lineage: dict[str, Any]) -> str:
    """The text of the Modelfile that lies beside the file `model`. A base model's template is the text itself.

    The template of another maker is left out: Ollama knows many by the one in the GGUF.
    """
    template = "{{ .Prompt }}" if is_base_model(tokenizer, lineage) else "" if tokenizer.their_template else _CHAT
    ids = dict.fromkeys((*config.eos_token_ids, tokenizer.eos_id, tokenizer.endoftext_id))
    stops = [tokenizer.token_bytes(token_id).decode("utf-8") for token_id in ids]
    defaults = SamplingSettings()
    lines = [f"FROM ./{model.name}", *([f'TEMPLATE """{template}"""'] if template else [])]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER temperature {defaults.temperature}", f"PARAMETER top_p {defaults.top_p}"]
    return "\n".join([*lines, f"PARAMETER num_ctx {config.max_position_embeddings}"]) + "\n"
