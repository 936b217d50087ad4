"""The process that renders chat templates of other makers: `python -m tinylm.tokenizer.template_worker`.

A template is a program. It runs in Jinja's sandbox, which gives it no way to Python's objects, and in a process of its
own, which can open no file, write none, and has little time and memory. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 24
"""Limits for one request: computing time, the memory of the process, and the length of what a template writes."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes, put between two marks."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own name and type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        marks: Any = self.environment.globals["marks"]
        return f"{marks[0]}{caller()}{marks[1]}"


def make_environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to a template: its filters and functions, and no others."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(str(message))

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def render(environment: ImmutableSandboxedEnvironment, request: dict[str, Any]) -> dict[str, str]:
    """{"text": what the template writes}, or {"error": why it does not}."""
    environment.globals["marks"] = request["marks"]
    pieces, length = [], 0
    try:
        for piece in environment.from_string(request["template"]).generate(**request["values"]):
            pieces.append(piece)
            if (length := length + len(piece)) > MAX_CHARACTERS:
                return {"error": f"it writes more than {MAX_CHARACTERS} characters"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # whatever a stranger's program raises
        return {"error": str(error) or type(error).__name__}


def confine() -> None:
    """From now on: no new file, no writing, little memory. Where the system knows such limits."""
    with contextlib.suppress(ImportError):
        import resource

        for limit, value in (("RLIMIT_AS", MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", 3)):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, limit), (value, value))


def main() -> None:
    """Answer requests until standard input ends. Too much computing time ends the process."""
    environment = make_environment()
    # Used once, so that what they import is there when no file can be opened any more.
    for template in ("{{ [1] | tojson }}{{ strftime_now('%d %b %Y') }}", "{{ nothing.at.all }}", "{% for %}"):
        render(environment, {"template": template, "values": {}, "marks": ["", ""]})
    confine()
    for line in sys.stdin.buffer:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        answers = [render(environment, request) for request in json.loads(line)]
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        reply = json.dumps(answers).encode("ascii") + b"\n"
        while reply:
            reply = reply[os.write(1, reply) :]


if __name__ == "__main__":
    main()
