"""Train a model that answers from scratch, on the embedded corpus.

    tinylm quickstart

tokenizer -> pretrain -> full SFT -> LoRA and DPO -> scoreboard -> chat. Each stage runs the recipe of its own command,
with settings for TinyWorld. Finished stages are skipped, interrupted stages are resumed.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinylm.checkpoint.model_folder import load_model
from tinylm.checkpoint.model_path import resolve_model_path
from tinylm.commandline.exit_status import RERUN_ADVICE, run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import format_seconds, make_console, progress
from tinylm.dataset import tinyworld
from tinylm.evaluation.skills import MEAN, PERSONA, PERSONA_RIGHT, PREFERENCE, STORY_MEAN, WARM, Scoreboard, scoreboard
from tinylm.files.atomic import write_json
from tinylm.files.untrusted import read_own_json
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.lora import unload_lora
from tinylm.model.weights import weights_fingerprint
from tinylm.system.cpu_parallel import num_cores
from tinylm.trainer import train_dpo, train_full_sft, train_lora, train_pretrain, train_tokenizer
from tinylm.trainer.run.train_settings import TrainSettings

SAMPLE_CHATS = (
    "Hello, I am Ruby. Who are you?",
    "Read this story. Tom and Mia were in Rome. Tom had a red kite. Tom gave the red kite to Mia.\n"
    "Who has the red kite?",
    "What is 12 plus 7?",
)


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """Settings of the quickstart."""

    output_dir: str = "out/quickstart"
    """folder for everything: tokenizer, models, scoreboard"""
    scale: float = 1.0
    """share of the training data; 0.1 is a rehearsal of a few minutes"""
    num_items: int = 100
    """held-out items per skill on the scoreboard"""
    seed: int = 42
    """seed of data, initialisation and order"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """precision of matrix products: auto, float32, bfloat16 or float16"""
    chat: bool = True
    """open a chat at the end if there is a terminal; else show three sample chats"""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale is {self.scale}; expected more than 0 and at most 100; pass --scale 1")
        if self.num_items < 1:
            raise ValueError(f"num_items is {self.num_items}; expected at least 1; pass --num_items 100")

    def sized(self, count: int) -> int:
        """`count` documents, chats or pairs, scaled; at least 64."""
        return max(64, round(self.scale * count))


@dataclass(frozen=True)
class Plan:
    """The settings of each stage."""

    tokenizer: train_tokenizer.TokenizerSettings
    pretrain: train_pretrain.PretrainSettings
    full_sft: train_full_sft.FullSFTSettings
    lora: train_lora.LoRASettings
    dpo: train_dpo.DPOSettings


def make_plan(settings: QuickstartSettings) -> Plan:
    """The settings of the stages; trials found the numbers, see docs/trials.md."""
    out = Path(settings.output_dir)
    shared: dict[str, Any] = {
        "max_seq_len": 256,
        "batch_size": 8,
        "device": settings.device,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "log_interval": 20,
        "eval_interval": 250,
        "eval_batches": 8,
        "save_interval": 400,
    }
    return Plan(
        train_tokenizer.TokenizerSettings(output_dir=str(out / "tokenizer"), vocab_size=1024),
        train_pretrain.PretrainSettings(
            output_dir=str(out / "pretrain"),
            tokenizer_path=str(out / "tokenizer"),
            preset="tiny",
            tinyworld_documents=settings.sized(12_500),
            qk_norm=True,
            learning_rate=1.2e-2,
            final_lr_fraction=0.5,
            **shared,
        ),
        train_full_sft.FullSFTSettings(
            output_dir=str(out / "full_sft"),
            model_path=str(out / "pretrain"),
            tinyworld_chats=settings.sized(8_000),
            learning_rate=6e-3,
            final_lr_fraction=0.05,
            **shared,
        ),
        train_lora.LoRASettings(
            output_dir=str(out / "lora"),
            model_path=str(out / "full_sft"),
            tinyworld_chats=settings.sized(1_200),
            lora_rank=8,
            lora_alpha=32,
            learning_rate=4e-3,
            **shared,
        ),
        train_dpo.DPOSettings(
            output_dir=str(out / "dpo"),
            model_path=str(out / "full_sft"),
            tinyworld_pairs=settings.sized(1_000),
            learning_rate=1e-4,
            **shared,
        ),
    )


def claim_folder(settings: QuickstartSettings) -> None:
    """Record the settings in the folder, and refuse a folder of other settings: its stages could not be used.

    Raises:
        ValueError: it holds a quickstart with another scale or seed.
    """
    record = Path(settings.output_dir) / "quickstart.json"
    ours = {"scale": settings.scale, "seed": settings.seed}
    if record.exists():
        theirs = read_own_json(record)
        if theirs != ours:
            flags = " ".join(f"--{name} {value}" for name, value in theirs.items())
            raise ValueError(
                f"{settings.output_dir} holds a quickstart made with {flags}; pass these to continue it, or choose "
                "another --output_dir for a new one"
            )
    else:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, ours)


def finished_model(stage: str, settings: TrainSettings) -> Path | None:
    """The model of a finished run with exactly these settings, if there is one in their output folder."""
    try:
        folder = resolve_model_path(settings.output_dir, stage)
        lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    theirs, ours = lineage.get("settings", {}), json.loads(json.dumps(dataclasses.asdict(settings)))
    is_same = {**theirs, "resume": True} == {**ours, "resume": True}
    return folder if lineage.get("finished") and is_same else None


def train_all(plan: Plan, console: Console) -> dict[str, Path]:
    """Run the stages that are not finished; returns the folder of each stage's model."""
    if (Path(plan.tokenizer.output_dir) / "tokenizer.json").exists():
        console.print("[bold]1/5 tokenizer[/bold]: already done")
    else:
        console.rule("1/5 tokenizer", align="left")
        train_tokenizer.train(plan.tokenizer)
    stages: list[tuple[str, TrainSettings, Callable[[Any], Path]]] = [
        ("pretrain", plan.pretrain, train_pretrain.train),
        ("full_sft", plan.full_sft, train_full_sft.train),
        ("lora", plan.lora, train_lora.train),
        ("dpo", plan.dpo, train_dpo.train),
    ]
    folders = {}
    for number, (stage, settings, train) in enumerate(stages, start=2):
        if folder := finished_model(stage, settings):
            console.print(f"[bold]{number}/5 {stage}[/bold]: already done, {folder}")
        else:
            console.rule(f"{number}/5 {stage}", align="left")
            has_state = any(Path(settings.output_dir).glob(f"{stage}_*_state/step_*"))
            folder = train(dataclasses.replace(settings, resume=has_state))
        folders[stage] = folder
    return folders


def measure(folders: dict[str, Path], num_items: int, console: Console) -> tuple[Scoreboard, bool]:
    """(the scoreboard of all models, whether the adapter's base has the same bits as before)."""
    columns = {"base": "pretrain", "SFT": "full_sft", "LoRA": "lora", "DPO": "dpo"}
    models = {name: load_model(folders[stage]) for name, stage in columns.items()}
    engines = {name: Engine(model, tokenizer) for name, (model, tokenizer, _) in models.items()}
    greedy = SamplingSettings(temperature=0.0, max_new_tokens=80)
    with progress(console, "scoreboard") as show:
        board = scoreboard(
            engines,
            tinyworld,
            greedy,
            reference="SFT",
            num_items=num_items,
            at_once=min(len(engines), num_cores(engines["SFT"].compute_model.device)),
            progress=lambda name, done, total: show(f"{name}, skill {done} of {total}"),
        )
    untouched = weights_fingerprint(models["SFT"][0]) == weights_fingerprint(unload_lora(models["LoRA"][0]))
    return board, untouched


def bars(board: Scoreboard, untouched: bool) -> list[tuple[str, str, str, bool]]:
    """(what, measured, wanted, met) for each bar that the quickstart promises to reach."""

    def value(column: str, row: str) -> float:
        found = board.value(column, row)
        assert found is not None
        return found

    worst = min(board.columns["SFT"].accuracy, key=board.columns["SFT"].accuracy.__getitem__)
    checks = [
        ("SFT: mean of skills", value("SFT", MEAN), 0.85, ">="),
        (f"SFT: weakest skill ({worst})", value("SFT", worst), 0.60, ">="),
        ("SFT: story questions", value("SFT", STORY_MEAN), 0.75, ">="),
        ("LoRA: replies in persona", value("LoRA", PERSONA), 0.95, ">="),
        ("LoRA: points lost, persona aside", value("SFT", MEAN) - value("LoRA", PERSONA_RIGHT), 0.03, "<="),
        ("DPO: held-out pairs preferred", value("DPO", PREFERENCE), 0.90, ">="),
        ("DPO: warm replies before", value("SFT", WARM), 0.50, "<"),
        ("DPO: warm replies after", value("DPO", WARM), 0.85, ">="),
        ("DPO: points lost", value("SFT", MEAN) - value("DPO", MEAN), 0.03, "<="),
    ]
    compare = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b + 1e-9, "<": lambda a, b: a < b}
    rows = [(what, f"{got:.1%}", f"{sign} {bar:.0%}", compare[sign](got, bar)) for what, got, bar, sign in checks]
    return [*rows, ("LoRA: base weights bit-identical without it", "yes" if untouched else "no", "yes", untouched)]


def show_bars(rows: list[tuple[str, str, str, bool]], console: Console) -> None:
    """Print the bars, and whether this run met them."""
    table = Table("bar", "measured", "wanted", "", title="what the quickstart aims at", title_justify="left")
    for what, got, wanted, met in rows:
        table.add_row(what, got, wanted, "[green]met[/green]" if met else "[red]missed[/red]")
    console.print(table)


def show_sample_chats(folder: Path, console: Console) -> None:
    """Print three questions and the model's replies."""
    model, tokenizer, _ = load_model(folder)
    engine = Engine(model, tokenizer)
    for question in SAMPLE_CHATS:
        reply = engine.reply(
            [{"role": "user", "content": question}], SamplingSettings(temperature=0.0, max_new_tokens=80)
        )
        console.print(f"  you: {question}\n  model: {reply}\n", markup=False)


def main(argv: list[str]) -> int:
    """The command line: plan, train the unfinished stages, measure, chat."""
    description = "Train a small chat model from scratch: tokenizer, pretraining, SFT, LoRA, DPO, scoreboard, chat."
    settings = parse_settings(QuickstartSettings, argv, "tinylm quickstart", description)
    console = make_console()
    claim_folder(settings)
    started = time.perf_counter()
    folders = train_all(make_plan(settings), console)
    trained = time.perf_counter() - started
    console.rule("scoreboard", align="left")
    board, untouched = measure(folders, settings.num_items, console)
    rows = bars(board, untouched)
    console.print(board.to_table())
    show_bars(rows, console)
    if settings.scale < 1:
        console.print(f"this run used {settings.scale:.0%} of the data; the goals are meant for all of it")
    seconds = time.perf_counter() - started
    out = Path(settings.output_dir)
    report = {
        "machine": platform.machine(),
        "processor": platform.processor() or platform.machine(),
        "seconds_training": round(trained),
        "seconds": round(seconds),
        "bars": [{"what": what, "measured": got, "wanted": wanted, "met": met} for what, got, wanted, met in rows],
        "scoreboard": board.to_json(),
    }
    write_json(out / "scoreboard.json", report)
    (out / "scoreboard.md").write_text(board.to_markdown() + "\n", encoding="utf-8")
    console.print(f"{format_seconds(seconds)} in all; scoreboard in {out / 'scoreboard.json'}", markup=False)
    chat = ["--model_path", str(folders["dpo"])]
    console.print(f"talk to it:             tinylm chat --model_path {folders['dpo']}", markup=False)
    console.print(f"talk to {tinyworld.PERSONA_NAME}:    tinylm chat --model_path {folders['lora']}\n", markup=False)
    if settings.chat and sys.stdin.isatty() and sys.stdout.isatty():
        from tinylm.commands.chat import main as chat_main

        return chat_main(chat)
    show_sample_chats(folders["dpo"], console)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, advice=RERUN_ADVICE))
