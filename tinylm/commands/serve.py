"""Serve models to other programs, over OpenAI's API.

tinylm serve                                                     # the model that `tinylm chat` would take
tinylm serve out/quickstart/dpo
tinylm serve out/quickstart/full_sft --adapter pip=out/quickstart/lora
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sys

from rich.console import Console

from tinylm.commandline.exit_status import Stopped, run_main
from tinylm.commandline.settings import model_first, parse_settings
from tinylm.commandline.terminal import make_console
from tinylm.commands.chat import find_model
from tinylm.server.settings import ServeSettings, named


def main(argv: list[str]) -> int:
    """The command line: listen, load, answer until a signal ends it."""
    settings = parse_settings(ServeSettings, model_first(argv), "tinylm serve", "Serve models over OpenAI's API.")
    try:
        from tinylm.server.listen import serve
    except ImportError as error:
        package = (error.name or "fastapi").split(".")[0]
        raise ValueError(f"the package {package} is not installed; pip install 'tinylm[serve]'") from None
    if [name for name, _ in named(settings.model_path)] in ([], [""]):
        settings = dataclasses.replace(settings, model_path=str(find_model(settings.model_path, weight="")))
    console = make_console()
    with listening(settings) as at:
        warn(settings, console)
        signum = asyncio.run(serve(settings, at, console.print))
    raise Stopped(signum)


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
