"""Whether a run may go on from a training state: it must be the same run, and what is changed must be harmless or said.

Data, parent, shape, batch and number of steps are compared by what they come to (fingerprints, numbers), however
they were asked for. Of the settings, those in `FREE` may change, those in `ADJUSTABLE` may too and the run says and
records it, and every other one must be what it was: half a run with one weight decay and half with another is
neither of the two, and reports as one of them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FREE = frozenset(
    # where things are, and when something is shown, tried or saved
    "output_dir validation_path max_bad_rows log_interval eval_interval eval_batches save_interval resume tensorboard "
    # how the same sums are computed; weights and optimizer state are float32 in any case
    "device dtype num_workers use_compile "
    # compared by what they come to: the data's fingerprint,
    "data_path validation_fraction tokenizer_path name author max_seq_len "
    # the number of steps and the rows of each,
    "epochs max_steps batch_size accumulation_steps "
    # the parent's weights and the model's config
    "model_path preset hidden_size num_hidden_layers num_attention_heads num_key_value_heads position_embedding_type "
    "qk_norm dropout".split()
)
ADJUSTABLE = frozenset({"learning_rate", "grad_clip"})
"""What a run that has diverged may need to change to go on."""


def check_same_run(folder: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `ADJUSTABLE` settings that are another now, each as {step, setting, was, now}.

    Args:
        folder: where the state lies.
        saved: the training state. One of an older version, with fewer entries, is held to what it has.
        ours: this run's "identity", "settings" and "sources" (what to call the data and the parent), as in the state.

    Raises:
        ValueError: the state is of another run; names what differs, both values and what to do.
    """
    changes = []
    unfinished = saved["step"] < saved["identity"]["num_steps"]
    for name, now in ours["settings"].items():
        was = saved.get("settings", {}).get(name, now)
        if was == now or name in FREE:
            continue
        if name not in ADJUSTABLE or not unfinished:
            raise ValueError(
                f"{folder} was made with {name} {_shown(was)}, this run has {_shown(now)}; pass --{name} "
                f"{shlex.quote(_shown(was))} to go on with it, or choose another --output_dir for a new run"
            )
        changes.append({"step": saved["step"], "setting": name, "was": was, "now": now})
    for name, now in ours["identity"].items():
        was = saved["identity"].get(name)
        if was != now:
            their_source, our_source = (each.get("sources", {}).get(name) for each in (saved, ours))
            raise ValueError(
                f"{folder} was made with {name} {_shown(was, their_source)}, this run has {_shown(now, our_source)}; "
                "resume with the settings and data it was started with, or choose another --output_dir"
            )
    return changes


def _shown(value: Any, source: str | None = None) -> str:
    """A value as a flag takes it; a fingerprint behind the path it belongs to, since nobody knows one by heart."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{source} (fingerprint {text})" if source else text
