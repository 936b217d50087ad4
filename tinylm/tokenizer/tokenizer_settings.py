"""What a folder says about its tokenizer beside tokenizer.json: which token has which role, and the chat template.

Only values are read. Nothing in these files is run, except the template, which `template_sandbox` renders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.files.untrusted import check_file, read_json, shown

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
MAX_TEMPLATE_CHARACTERS = 1 << 18
"""The longest chat templates in use have 20,000 characters."""

ROLES = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """The content of tokenizer_config.json, and the chat template, or None."""

    config: dict[str, Any]
    chat_template: str | None

    def token(self, role: str) -> str | None:
        """The name of the token with a role, one of `ROLES`; None if there is none."""
        value = self.config.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) and value else None


def read_settings(folder: Path) -> TokenizerSettings | None:
    """The settings in a folder; None if it has none.

    Raises:
        ValueError: a file is damaged or leads out of the folder, or a value has the wrong type.
    """
    has_config, has_template = (folder / CONFIG_FILE).exists(), (folder / TEMPLATE_FILE).exists()
    if not has_config and not has_template:
        return None
    config = read_json(folder / CONFIG_FILE) if has_config else {}
    for role in ROLES:
        value = config.get(role)
        if not isinstance(value.get("content") if isinstance(value, dict) else value, str | None):
            raise ValueError(f"{folder / CONFIG_FILE} has {role} {shown(value)}; expected the name of a token")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if has_template:
        check_file(folder / TEMPLATE_FILE, "a chat template is expected there")
        if (size := (folder / TEMPLATE_FILE).stat().st_size) > 4 * MAX_TEMPLATE_CHARACTERS:
            raise ValueError(
                f"{folder / TEMPLATE_FILE} has {size} bytes; at most {4 * MAX_TEMPLATE_CHARACTERS} expected"
            )
        template = (folder / TEMPLATE_FILE).read_bytes().decode("utf-8", errors="replace")
    if not isinstance(template, str | None) or len(template or "") > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"{folder / CONFIG_FILE} has a chat_template of type {type(template).__name__}; expected a text of up to "
            f"{MAX_TEMPLATE_CHARACTERS} characters"
        )
    return TokenizerSettings(config, template or None)


def names_before_text(definition: dict[str, Any]) -> list[str]:
    """The names of the tokens that a tokenizer.json puts before a plain text: its post-processor says it.

    `add_bos_token` in tokenizer_config.json is not asked: beside a tokenizer.json, transformers ignores it too.
    """
    processor = definition.get("post_processor")
    steps = processor.get("processors") if isinstance(processor, dict) and "processors" in processor else [processor]
    names: list[str] = []
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if isinstance(step, dict) and step.get("type") == "TemplateProcessing" else None
        for piece in single if isinstance(single, list) else []:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if not isinstance(token, dict):
                break
            names.append(str(token.get("id")))
    return names
