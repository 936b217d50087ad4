"""The models of a server: loaded once, each with a scheduler of its own; adapters share their base's weights."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylm.checkpoint.adapter_folder import load_adapter
from tinylm.checkpoint.loading import LoadedModel, load_for_use
from tinylm.checkpoint.model_folder import check_tokenizer, recorded_tokenizer
from tinylm.checkpoint.model_path import named_paths, resolve_adapter_path
from tinylm.checkpoint.snapshots import snapshot_folder, snapshots_in
from tinylm.files.untrusted import shown
from tinylm.generation.engine import Engine
from tinylm.generation.request import Request
from tinylm.generation.sampling import SamplingSettings
from tinylm.generation.scheduler import Scheduler, SchedulerSettings, run_together
from tinylm.model.adapted_copy import adapted_copy
from tinylm.model.inference_copy import inference_copy
from tinylm.model.lora import unload_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.page.card import prompts_for
from tinylm.server.errors import ApiError
from tinylm.server.settings import ServeSettings
from tinylm.system.allocator import give_back_freed_memory
from tinylm.system.memory import memory_limit
from tinylm.system.runtime import setup_runtime
from tinylm.tokenizer.chat_template import chat_fault
from tinylm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model, or a model with an adapter, under the name that clients choose it by."""

    name: str
    engine: Engine
    scheduler: Scheduler
    created: int
    """When it was loaded (seconds since 1970)."""
    parent: str | None = None
    """The name of the model that this adapter is on."""
    why_no_chats: str = ""
    """Why it cannot be asked for the next message of a conversation; empty where it can."""
    num_parameters: int = 0
    is_base: bool = False
    """Whether it was only pretrained, so that it continues text."""
    path: Path = Path()
    adapter: Path | None = None
    prompts: tuple[str, ...] = ()
    """Questions that the page offers."""

    @property
    def snapshots(self) -> dict[int, Path]:
        """The snapshots that its run has left, by step."""
        return snapshots_in(snapshot_folder(self.adapter or self.path))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.tokenizer


class ServedModels:
    """All models of a server, and the thread that computes.

    Args:
        settings: of the server.
        say: called with one line for each model that is loaded, and with what users must know about it.

    Raises:
        FileNotFoundError, ValueError: a model or an adapter cannot be served; the message says which, and why.
    """

    def __init__(self, settings: ServeSettings, say: Callable[[str], None] = lambda line: None) -> None:
        self._settings, self._say = settings, say
        self._runtime = setup_runtime(settings.device, settings.dtype, only_uses=True)
        self._changed = threading.Condition()
        self._models: dict[str, ServedModel] = {}
        paths, adapters = named_paths(settings.model_path), named_paths(settings.adapter)
        self._is_alone = len(paths) == 1
        if (memory := memory_limit(self._runtime.device)) is not None and settings.cache_bytes > memory:
            raise ValueError(f"cache_bytes is {settings.cache_bytes:,}; the device has {memory:,}; set less")
        cache_bytes = settings.cache_bytes // (len(paths) + len(adapters))
        self._scheduling = dataclasses.replace(settings.scheduling, cache_bytes=cache_bytes)
        bases = []
        for name, path in paths:
            base = self._load(name, path)
            bases += [base] if adapters else []
        for name, path in adapters:
            self._adapt(name, Path(resolve_adapter_path(path)), bases)
        del bases  # the weights in float32
        give_back_freed_memory()
        schedulers = [model.scheduler for model in self._models.values()]
        self._thread = threading.Thread(target=run_together, args=(schedulers,), name="scheduler", daemon=True)
        self._thread.start()

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._models.values())

    def named(self, name: str | None) -> ServedModel:
        """The model of this name; without one, the first.

        Raises:
            ApiError: there is no such model.
        """
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            known = ", ".join(self._models)
            message = f"model {shown(name, 100)} is not served here; expected one of {known}"
            raise ApiError(404, message, "model", "model_not_found")
        return self._models[name]

    def close(self, timeout: float) -> None:
        """Answer what was accepted, for at most `timeout` seconds; cancel the rest."""
        for drain, seconds in ((True, timeout), (False, 5.0)):
            for model in self:
                model.scheduler.close(drain)
            self._thread.join(seconds)

    # ------------------------------------------------------------------------------------------------------ loading

    def _load(self, name: str, path: str) -> tuple[str, LoadedModel]:
        """Serve a model; returns its name and the model itself."""
        settings = self._settings
        loaded = load_for_use(path, tokenizer_path=settings.tokenizer_path, device=self._runtime.device, newest=True)
        name = name or (loaded.path.stem if loaded.path.is_file() else loaded.path.name)
        self._add(name, inference_copy(loaded.model, self._runtime.compute_dtype), loaded)
        if loaded.notice:
            self._say(loaded.notice)
        return name, loaded

    def _adapt(self, name: str, folder: Path, bases: list[tuple[str, LoadedModel]]) -> None:
        """Serve an adapter beside the first model that it fits."""
        misfit: ValueError | None = None
        for base_name, loaded in bases:
            try:
                load_adapter(loaded.model, folder, loaded.path)
            except ValueError as error:
                misfit = misfit or error
                continue
            check_tokenizer(loaded.tokenizer, recorded_tokenizer(folder), folder, loaded.path)
            base = self._models[base_name].scheduler.model
            self._add(name or folder.name, adapted_copy(base, loaded.model), loaded, base_name, folder)
            unload_lora(loaded.model)
            return
        assert misfit is not None
        raise misfit

    def _fitting(self, model: TinyLMForCausalLM) -> SchedulerSettings:
        """The settings; a context for several models may be longer than that of one, which then has its own."""
        settings, longest = self._scheduling, model.config.max_position_embeddings
        if self._is_alone or settings.context_length is None:
            return settings
        return dataclasses.replace(settings, context_length=min(settings.context_length, longest))

    def _add(
        self,
        name: str,
        model: TinyLMForCausalLM,
        loaded: LoadedModel,
        parent: str | None = None,
        adapter: Path | None = None,
    ) -> None:
        if name in self._models:
            raise ValueError(f"two models have the name {name}; expected different ones; give names: name=path")
        engine = Engine(model, loaded.tokenizer, model.dtype, loaded.document_start)
        scheduler = Scheduler(model, loaded.tokenizer, self._fitting(model), self._changed)
        _require_sound(scheduler, name)
        why = chat_fault(loaded.tokenizer)
        is_base = loaded.lineage.get("stage") == "pretrain" and not parent
        served = ServedModel(
            name,
            engine,
            scheduler,
            created=int(time.time()),
            parent=parent,
            why_no_chats=why,
            num_parameters=loaded.model.num_parameters(),
            is_base=is_base,
            path=loaded.path,
            adapter=adapter,
            prompts=() if why or is_base else prompts_for(adapter or loaded.path),
        )
        self._models[name] = served
        kind = f"adapter of {parent}" if parent else f"{served.num_parameters:,} parameters"
        kind += ", a base model, which continues text" * served.is_base
        self._say(
            f"{name}: {kind}, {str(model.dtype).removeprefix('torch.')}, {scheduler.max_streams} answers at a time, "
            f"contexts of {scheduler.context_length} tokens" + f"; chats are refused: {why}" * bool(why)
        )


def _require_sound(scheduler: Scheduler, name: str) -> None:
    """Answer one token, so that damaged weights are found before the first client comes."""
    with torch.inference_mode():
        scheduler.submit(Request([0], SamplingSettings(max_new_tokens=1, temperature=0)))
        events = []
        while scheduler.has_work:
            events += scheduler.step()
    if events[-1].error:
        raise ValueError(f"{name}: {events[-1].error}")
