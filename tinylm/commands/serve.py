"""Serve models to other programs, over OpenAI's API.

tinylm serve                                                     # the model that `tinylm chat` would take
tinylm serve out/quickstart                                      # a model of each stage
tinylm serve out/quickstart/dpo
tinylm serve out/quickstart/full_sft --adapter pip=out/quickstart/lora
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sys
from pathlib import Path

from rich.console import Console

from tinylm.checkpoint.model_path import is_adapter, is_model, named_paths
from tinylm.commandline.exit_status import Stopped, run_main
from tinylm.commandline.settings import model_first, parse_settings
from tinylm.commandline.terminal import make_console
from tinylm.commands.find_model import find_model, one_of_each_stage
from tinylm.server.settings import ServeSettings


def main(argv: list[str]) -> int:
    """The command line: listen, load, answer until a signal ends it."""
    settings = parse_settings(ServeSettings, model_first(argv), "tinylm serve", "Serve models over OpenAI's API.")
    try:
        from tinylm.server.listen import serve
    except ImportError as error:
        package = (error.name or "fastapi").split(".")[0]
        raise ValueError(f"the package {package} is not installed; pip install 'tinylm[serve]'") from None
    settings = with_models(settings)
    console = make_console()
    with listening(settings) as at:
        warn(settings, console)
        signum = asyncio.run(serve(settings, at, console.print))
    if signum:
        raise Stopped(signum)
    return 0


def with_models(settings: ServeSettings) -> ServeSettings:
    """The settings with the models found: a folder with a folder for each stage means one of each."""
    if [name for name, _ in named_paths(settings.model_path)] not in ([], [""]):
        return settings
    folder = Path(settings.model_path)
    if not settings.runs_dir and settings.model_path and folder.is_dir():
        settings = dataclasses.replace(settings, runs_dir=str(folder.parent if is_model(folder) else folder))
    found = one_of_each_stage(folder) if settings.model_path and not settings.adapter else []
    models, adapters = [each for each in found if not is_adapter(each)], [each for each in found if is_adapter(each)]
    if not models:
        return dataclasses.replace(settings, model_path=str(find_model(settings.model_path, weight="")))
    paths, adapter = (",".join(f"{each.name}={each}" for each in some) for some in (models, adapters))
    return dataclasses.replace(settings, model_path=paths, adapter=adapter)


def listening(settings: ServeSettings) -> socket.socket:
    """A socket that listens at the address of the settings.

    Raises:
        ValueError: the address is taken, or not this machine's.
    """
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"host {settings.host} is not known ({error.strerror}); choose another --host") from None
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held up by connections that have ended
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen at {where} ({error.strerror}); choose another --port or --host") from None
    return listener


def warn(settings: ServeSettings, console: Console) -> None:
    """Say what lets strangers in."""
    if not settings.is_local and not settings.key:
        console.print(f"warning: other machines can use {settings.host}:{settings.port}, and there is no API key")


if __name__ == "__main__":
    sys.exit(run_main(main, advice=""))
