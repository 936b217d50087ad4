"""Train a model that answers from scratch, on the embedded corpus.

    tinylm quickstart

tokenizer -> pretrain -> full SFT -> LoRA and DPO -> scoreboard -> chat. Each stage runs the recipe of its own command,
with settings for TinyWorld. Finished stages are skipped, interrupted stages are resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinylm.checkpoint.model_path import resolve_model_path
from tinylm.commandline.exit_status import RERUN_ADVICE, run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import format_seconds, make_console
from tinylm.commands.quickstart_journey import SHARES, Journey, expected_seconds
from tinylm.commands.quickstart_report import curves_of, draw_report
from tinylm.commands.quickstart_scores import (
    COLUMNS,
    Scores,
    goals,
    kept_scores,
    measure,
    score_key,
    show_goals,
    show_prompts,
    show_sample_chats,
)
from tinylm.files.atomic import atomic_write, write_json
from tinylm.files.untrusted import read_own_json
from tinylm.system.runtime import DtypeName, Runtime, setup_runtime
from tinylm.trainer import train_dpo, train_full_sft, train_lora, train_pretrain, train_tokenizer
from tinylm.trainer.run.train_settings import TrainSettings

FULL_NUM_ITEMS = 100
"""Held-out items per skill of a whole quickstart: the standard error of a skill's share is then at most 0.05."""
SMALLEST_NUM_ITEMS = 10
SNAPSHOTS = 8
"""Of pretraining and of SFT, 6.4 MB each: the page shows with them how the model learnt."""


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """Settings of the quickstart."""

    output_dir: str = "out/quickstart"
    """folder for everything: tokenizer, models, scoreboard"""
    scale: float = 1.0
    """share of the training data; 0.1 is a rehearsal of a few minutes"""
    num_items: int | None = None
    """held-out items per skill on the scoreboard; unset: 100, with a scale below 1 in proportion, and at least 10"""
    seed: int = 42
    """seed of data, initialisation and order"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: DtypeName = "auto"
    """precision of matrix products; auto is bfloat16 where the hardware has it, else float32"""
    chat: bool = True
    """open a chat at the end if there is a terminal"""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale is {self.scale}; expected more than 0 and at most 100; pass --scale 1")
        if self.num_items is not None and self.num_items < 1:
            raise ValueError(f"num_items is {self.num_items}; expected at least 1; pass --num_items 100")

    @property
    def items_per_skill(self) -> int:
        """Held-out items per skill."""
        return self.num_items or max(SMALLEST_NUM_ITEMS, round(min(1.0, self.scale) * FULL_NUM_ITEMS))

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
            tinyworld_documents=settings.sized(10_600),
            qk_norm=True,
            learning_rate=1.2e-2,
            final_lr_fraction=0.5,
            snapshots=SNAPSHOTS,
            **shared,
        ),
        train_full_sft.FullSFTSettings(
            output_dir=str(out / "full_sft"),
            model_path=str(out / "pretrain"),
            tinyworld_chats=settings.sized(6_800),
            learning_rate=6e-3,
            final_lr_fraction=0.05,
            snapshots=SNAPSHOTS,
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


def train_all(plan: Plan, journey: Journey) -> dict[str, Path]:
    """Run the stages that are not finished; returns the folder of each stage's model."""
    if "tokenizer" in journey.done:
        journey.skip("tokenizer", plan.tokenizer.output_dir)
    else:
        journey.run("tokenizer", partial(train_tokenizer.train, plan.tokenizer))
    stages: list[tuple[str, TrainSettings, Callable[[Any], Path]]] = [
        ("pretrain", plan.pretrain, train_pretrain.train),
        ("full_sft", plan.full_sft, train_full_sft.train),
        ("lora", plan.lora, train_lora.train),
        ("dpo", plan.dpo, train_dpo.train),
    ]
    folders: dict[str, Path] = {}
    for stage, settings, train in stages:
        if folder := finished_model(stage, settings):
            journey.skip(stage, folder)
            folders[stage] = folder
        else:
            has_state = any(Path(settings.output_dir).glob(f"{stage}_*_state/step_*"))
            folders[stage] = journey.run(stage, partial(train, dataclasses.replace(settings, resume=has_state)))
    return folders


def is_done(plan: Plan, report: Path, num_items: int, runtime: Runtime) -> dict[str, bool]:
    """Which steps an earlier call has done."""
    folders = {
        "pretrain": finished_model("pretrain", plan.pretrain),
        "full_sft": finished_model("full_sft", plan.full_sft),
        "lora": finished_model("lora", plan.lora),
        "dpo": finished_model("dpo", plan.dpo),
    }
    models = {stage: folder for stage, folder in folders.items() if folder}
    is_scored = len(models) == len(folders) and kept_scores(report, score_key(models, num_items, runtime)) is not None
    return {
        "tokenizer": (Path(plan.tokenizer.output_dir) / "tokenizer.json").exists(),
        **{stage: stage in models for stage in folders},
        "scoreboard": is_scored,
    }


def score_all(
    settings: QuickstartSettings, folders: dict[str, Path], runtime: Runtime, journey: Journey
) -> tuple[Scores, dict[str, Any]]:
    """(the scores, the report's part on them), measured unless the report holds them for exactly these models."""
    report = Path(settings.output_dir) / "scoreboard.json"
    key = score_key(folders, settings.items_per_skill, runtime)
    if scores := kept_scores(report, key):
        journey.skip("scoreboard", report)
    else:
        scores = journey.run(
            "scoreboard", partial(measure, folders, settings.items_per_skill, runtime, journey.console)
        )
    return scores, {"key": key, "goals": goals(scores), **scores.to_json()}


def write_report(settings: QuickstartSettings, scores: Scores, parts: dict[str, Any], journey: Journey) -> None:
    """Write scoreboard.json, scoreboard.md and report.svg, unless they are there and this call did nothing."""
    out = Path(settings.output_dir)
    picture = out / "report.svg"
    if not journey.timed and picture.exists():
        return
    seconds = {step: round(value, 1) for step, value in journey.timed.items()}
    with contextlib.suppress(OSError, ValueError):  # no report yet
        before = read_own_json(out / "scoreboard.json").get("seconds")
        seconds = {**before, **seconds} if isinstance(before, dict) else seconds
    machine = {"machine": platform.machine(), "processor": platform.processor() or platform.machine()}
    write_json(out / "scoreboard.json", {**machine, "seconds": seconds, **parts})
    with atomic_write(out / "scoreboard.md") as file:
        file.write(scores.board.to_markdown().encode() + b"\n")
    stages = curves_of({stage: out / stage for stage in COLUMNS.values()}, journey.console)
    key = parts["key"]
    facts = [f"{key['device']}, {key['dtype']}", f"seed {settings.seed}"]
    if settings.scale != 1:
        facts.append(f"{settings.scale:.0%} of the data")
    if set(journey.timed) == set(SHARES):  # this call did all of it, so its time is the whole's
        facts.append(f"{format_seconds(sum(journey.timed.values()))} in all")
    with atomic_write(picture) as file:
        file.write(draw_report(stages, scores.board, parts["goals"], facts))


def main(argv: list[str]) -> int:
    """The command line: plan, train the unfinished stages, measure, chat."""
    description = "Train a small chat model from scratch: tokenizer, pretraining, SFT, LoRA, DPO, scoreboard, chat."
    settings = parse_settings(QuickstartSettings, argv, "tinylm quickstart", description)
    console = make_console()
    claim_folder(settings)
    runtime = setup_runtime(settings.device, settings.dtype)
    plan, out = make_plan(settings), Path(settings.output_dir)
    done = is_done(plan, out / "scoreboard.json", settings.items_per_skill, runtime)
    vocab_size, seconds = plan.tokenizer.vocab_size, 0.0
    if not all(done.values()):
        seconds = expected_seconds(settings.scale, plan.pretrain, vocab_size, runtime)
    journey = Journey(console, seconds, done)
    journey.say_start(runtime, settings.output_dir)
    if settings.items_per_skill != FULL_NUM_ITEMS:
        console.print(f"the scoreboard asks {settings.items_per_skill} held-out items per skill, not {FULL_NUM_ITEMS}")
    folders = train_all(plan, journey)
    scores, parts = score_all(settings, folders, runtime, journey)
    write_report(settings, scores, parts, journey)
    console.print(scores.board.to_table())
    show_goals(parts["goals"], console)
    if settings.scale < 1:
        console.print(f"this run used {settings.scale:.0%} of the data; the goals are meant for all of it")
    if journey.timed:
        console.print(f"{format_seconds(sum(journey.timed.values()))} in all; scoreboard in {out}/scoreboard.json")
    console.print(f"all of it as a picture: {out}/report.svg\n")
    show_sample_chats(scores.board, console)
    show_prompts(scores.prompts, {stage: str(out / stage) for stage in folders}, console)
    if settings.chat and sys.stdin.isatty() and sys.stdout.isatty():
        from tinylm.commands.chat import main as chat_main

        return chat_main(["--model_path", str(folders["dpo"])])
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, advice=RERUN_ADVICE))
