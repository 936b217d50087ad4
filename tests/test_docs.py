"""What README and docs show is true of the code: examples run, commands parse, links and paths lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tinylm import cli
from tinylm.commandline.settings import SHARED_FLAGS, model_first, parse_settings
from tinylm.dataset import tinyworld

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SCRIPTS = {
    "train_tokenizer.py": "tokenizer",
    "train_pretrain.py": "pretrain",
    "train_full_sft.py": "sft",
    "train_lora.py": "lora",
    "train_dpo.py": "dpo",
    "inference.py": "chat",
}
"""The original project's script names -> our commands."""
ABOUT_ONE_MODEL = ("serve", "import", "verify", "export")
"""Commands whose first word may be the model's path."""
OTHER_FLAGS = {"help", "version"} | {
    "nnodes", "nproc_per_node", "max_restarts", "rdzv_conf", "rdzv_endpoint", "rdzv_id", "net", "lora"
}  # fmt: skip
"""argparse's own; torchrun's, unshare's, llama.cpp's."""


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


class Found(BaseException):
    """Carries a command's settings class out of its `main`."""


def settings_of(command: str) -> Any:
    """The dataclass that a command parses: what its `main` hands to `parse_settings`."""
    module_name, _, name = cli.COMMANDS[command].target.partition(":")
    module = importlib.import_module(module_name)

    def catch(cls: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise Found(cls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse_settings", catch)
        with pytest.raises(Found) as caught:
            getattr(module, name)([])
    return caught.value.args[0]


def shell_commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's shell blocks, redirections and here-documents left out."""
    for block in blocks(page, "sh"):
        without_documents = re.sub(r"<<'EOF'\n.*?^EOF$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in without_documents.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(re.sub(r"\s[<>]\s*[\w./]+\s*$", "", part.partition("  #")[0]), comments=True)
                if words:
                    yield words


def our_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(command, arguments) of every command of ours in the shell blocks of a page, under either name."""
    for words in shell_commands(page):
        if words[0] == "tinylm":
            yield words[1], words[2:]
        for place, word in enumerate(words):
            if Path(word).name in SCRIPTS and words[0] in ("python", "torchrun"):
                yield SCRIPTS[Path(word).name], words[place + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_run(page: Path) -> None:
    """Blocks with >>> run as doctests, one after another in one namespace; other Python at least compiles."""
    parser, namespace = doctest.DocTestParser(), dict[str, Any]()
    for number, code in enumerate(blocks(page, "python", "py")):
        if ">>>" not in code:
            compile(code, f"{page.name} block {number}", "exec")
            continue
        example = parser.get_doctest(code, namespace, f"{page.name}[{number}]", str(page), 0)
        report: list[str] = []
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(example, out=report.append, clear_globs=False)
        namespace.update(example.globs)
        assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_there_are_examples_and_commands() -> None:
    """The tests above and below would pass on empty pages."""
    assert sum(">>>" in code for page in PAGES for code in blocks(page, "python")) > 20
    shown = {command for page in PAGES for command, _ in our_commands(page)}
    assert shown >= set(cli.COMMANDS) - {"quickstart"}, "README or docs should show every command"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command line shown is one that the command accepts, flags and values."""
    for command, argv in our_commands(page):
        assert command in cli.COMMANDS, f"{page.name}: tinylm {command}"
        if command == "run":
            continue
        if command in ABOUT_ONE_MODEL:
            argv = model_first(argv)
        try:
            parse_settings(settings_of(command), argv, f"tinylm {command}", "")
        except SystemExit as stop:
            assert stop.code == 0, f"{page.name}: tinylm {command} {argv}: {capsys.readouterr().err}"


def test_flags_in_the_text_exist() -> None:
    """A flag named between words belongs to some command."""
    known = {name for command in set(cli.COMMANDS) - {"run"} for name in settings_of(command).__dataclass_fields__}
    known |= set(SHARED_FLAGS) | OTHER_FLAGS
    for page in PAGES:
        others = "\n".join(part for part in blocks(page, "text") if "tinylm " not in part)  # commands of other programs
        theirs = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z_-]*)", others)}
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        shown = {flag.replace("-", "_") for flag in re.findall(r"`[^`]*?--([a-z][a-z_-]*)", text)}
        assert shown <= known | theirs, f"{page.name}: {sorted(shown - known - theirs)}"
        named = set(re.findall(r"`tinylm ([a-z]+)", text))
        assert named <= set(cli.COMMANDS), f"{page.name}: {sorted(named - set(cli.COMMANDS))}"


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_exist(page: Path) -> None:
    """Paths of ours in backticks exist; a bare name.py is some file of the package."""
    modules = {path.name for path in (ROOT / "tinylm").rglob("*.py")}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for path in re.findall(r"`((?:tinylm|tests|docs|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in re.findall(r"`(\w+\.py)`", text):
        assert name in modules, f"{page.name} names {name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        shown = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert shown <= targets, f"{page.name}: {sorted(shown - targets)}"


SAMPLES = re.compile(r"(?<=<!-- samples -->\n).*?(?=<!-- /samples -->)", flags=re.DOTALL)


def quoted(text: str) -> str:
    """A Markdown quotation: the first paragraph wrapped, the rest a line each."""
    first, *rest = text.split("\n")
    lines = [f"> {line}" for line in textwrap.wrap(first, 116)]
    if rest:
        lines += [">", *(f"> {line}\\" for line in rest[:-1]), f"> {rest[-1]}"]
    return "\n".join(lines)


def spoken(role: str, text: str) -> str:
    """A line of a chat, wrapped under its speaker."""
    parts = [line for line in text.split("\n") if line]
    return textwrap.fill(" ".join(parts), 116, initial_indent=f"{role}: ", subsequent_indent="    ")


def quickstart_samples() -> str:
    """Documents, a chat, the persona and a preference pair, for docs/quickstart.md."""
    documents = [tinyworld.pretrain_document(i) for i in range(100)]
    story = next(text for text in documents if "\n" not in text)
    with_questions = [text for text in documents if text.startswith(("Once upon", "One day")) and text.count("\n") > 3]
    chat = tinyworld.conversation(0).messages
    persona = tinyworld.persona_conversation(0).messages[-2:]
    pair = next(pair for pair in tinyworld.preference_pairs(100) if pair.kind == "truth" and len(pair.prompt) > 1)
    lines = [spoken(message["role"], message["content"]) for message in chat]
    lines += ["", *(spoken(message["role"], message["content"]) for message in persona)]
    lines += ["", spoken("user", "[...] " + pair.prompt[-1]["content"])]
    lines += [spoken("chosen", pair.chosen), spoken("rejected", pair.rejected)]
    return "\n\n".join(
        [
            "Two documents that pretraining sees, a story and a story with questions:",
            quoted(story),
            quoted(with_questions[0]),
            "A training chat, the end of a chat in the persona that LoRA learns, and a preference pair for DPO:",
            "```text\n" + "\n".join(lines) + "\n```\n",
        ]
    )


def skill_table() -> str:
    """One held-out question per skill, for docs/tinyworld.md."""
    rows = ["| skill | a held-out question | the reference answer |", "|---|---|---|"]
    for skill in tinyworld.SKILLS:
        item = tinyworld.test_item(skill, 0)
        question, answer = item.messages[-2]["content"].split("\n")[-1], item.accepted[0]
        if skill in tinyworld.STORY_QUESTION_SKILLS:
            question = "(story) " + re.split(r"(?<=[.?!\"])\s+", question)[-1]
        rows.append(f"| `{skill}` | {question} | {answer} |")
    return "\n".join(rows) + "\n"


GENERATED = {"docs/quickstart.md": quickstart_samples, "docs/tinyworld.md": skill_table}


@pytest.mark.parametrize("name", GENERATED)
def test_tinyworld_samples_are_real(name: str) -> None:
    """What README and docs show of TinyWorld is what the generator makes."""
    shown = SAMPLES.search((ROOT / name).read_text(encoding="utf-8"))
    assert shown and shown[0] == GENERATED[name](), f"{name} shows an older TinyWorld; run python -m tests.test_docs"


def test_quickstart_is_described_as_it_is() -> None:
    """The sizes in the page's table of steps are those of the quickstart's plan."""
    from tinylm.commands.quickstart import QuickstartSettings, make_plan
    from tinylm.model.model_tinylm import TinyLMConfig

    plan = make_plan(QuickstartSettings())
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    millions = TinyLMConfig.preset(plan.pretrain.preset, vocab_size=plan.tokenizer.vocab_size).num_parameters() / 1e6
    for shown in (
        f"learns {plan.tokenizer.vocab_size} tokens",
        f"a {millions:.1f}M-parameter model",
        f"{plan.pretrain.tinyworld_documents:,} short documents",
        f"from {plan.full_sft.tinyworld_chats:,} chats",
        f"{QuickstartSettings().items_per_skill} questions per skill",
    ):
        assert shown in text, f"docs/quickstart.md should say: {shown}"


if __name__ == "__main__":  # write the samples again
    for changed, make in GENERATED.items():
        before, _, rest = (ROOT / changed).read_text(encoding="utf-8").partition("<!-- samples -->\n")
        after = rest[rest.index("<!-- /samples -->") :]
        (ROOT / changed).write_text(before + "<!-- samples -->\n" + make() + after, encoding="utf-8")
