"""From a file of records to the right measure: a task is recognised by the fields of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tinylm.dataset.sources.finding import find_files
from tinylm.dataset.sources.record_shapes import BadRow, Record, messages_of, preference_of, text_of
from tinylm.dataset.sources.records import read_records
from tinylm.evaluation.bits_per_byte import LossReport, text_loss
from tinylm.evaluation.exact_match import answer_matches, token_f1
from tinylm.evaluation.minimal_pairs import MinimalPair, minimal_pair_accuracy
from tinylm.evaluation.multiple_choice import ChoiceQuestion, last_word_accuracy, multiple_choice_accuracy
from tinylm.evaluation.preferences import ReferenceModel, preference_accuracy
from tinylm.evaluation.results import Measure, measure_of, ratio_and_error
from tinylm.evaluation.sequence_logprob import Progress, TokenIds, sequence_logprobs
from tinylm.evaluation.skills import Replier, question_of
from tinylm.files.untrusted import shown
from tinylm.tokenizer.chat_template import encode_chat

FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "blimp": (("good", "bad"),),
    "multiple_choice": (("query", "choices", "gold"),),
    "lambada": (("context", "continuation"),),
    "preferences": (("chosen", "rejected"),),
    "generate": (("question", "answer"),),
    "chat": (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion")),
    "bits_per_byte": (("text",),),
}
"""Task -> the fields that its records have, any one of the groups. The first task that fits is taken, so
preferences come before conversations (a preference row may hold both)."""

TASKS = ("skills", *FIELDS)


@dataclass(frozen=True)
class Evaluator:
    """A model with all that the tasks need."""

    model: Any
    tokenizer: Any
    engine: Replier
    """Generation engine of the same model."""
    sampling: Any
    """`SamplingSettings` of the tasks that generate."""
    tokens_per_batch: int
    document_start: TokenIds
    """What documents began with when the model was trained (see `opened`)."""
    reference: ReferenceModel | None = None
    """What preferences are measured against."""
    progress: Progress | None = None


def recognise_task(fields: Iterable[str], where: str) -> str:
    """The task of records with these fields.

    Raises:
        ValueError: no task has such records.
    """
    found = set(fields)
    for task, groups in FIELDS.items():
        if any(found.issuperset(group) for group in groups):
            return task
    known = "; ".join(" or ".join("+".join(group) for group in groups) for groups in FIELDS.values())
    raise ValueError(f"{where}: fields {', '.join(sorted(found))}; expected one of: {known}; rename the fields")


def data_files(path: str) -> list[str]:
    """The files that a path names, each a task of its own: a file, a folder's files, or those of a glob."""
    return [path] if path.startswith("hub:") else [str(file) for file in find_files(path)]


def first_fields(path: str) -> tuple[list[str], str]:
    """Fields of a file's first record and the place they were found at."""
    record = next(_records(path), None)
    if record is None:
        raise ValueError(f"{path}: no records; expected at least one; check the file")
    return list(record.data), f"{record.path}, line {record.line}"


def run_task(evaluator: Evaluator, task: str, path: str, limit: int | None = None) -> list[Measure]:
    """Measure one file.

    Args:
        task: one of `TASKS` other than `skills`, which needs no file.
        limit: first so many records (of each set, for minimal pairs).
    """
    run = _RUNNERS[task]
    try:
        return run(evaluator, _records(path), Path(path).name.split(".")[0], limit)
    except BadRow as error:
        raise ValueError(f"{error}; correct the row or take it out") from None


def _records(path: str) -> Iterator[Record]:
    """Every record, or an error: training may skip a broken row, a measurement would mean something else."""
    try:
        yield from read_records(path)
    except BadRow as error:
        raise ValueError(f"{error}; correct the row or take it out") from None


def _field(record: Record, name: str, kind: type | tuple[type, ...]) -> Any:
    value = record.data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"{name} is {shown(value)}" if name in record.data else f"no field {name!r}"
        expected = " or ".join(_WORDS[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{record.path}, line {record.line}: {found}; expected {expected}; correct it")
    return value


_TEXT_OR_NUMBER = (str, int, float)
_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", list: "a list"}


def _run_bits_per_byte(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    texts = [text_of(record) for record in islice(records, limit)]
    report = text_loss(
        e.model, e.tokenizer, texts, e.document_start, tokens_per_batch=e.tokens_per_batch, progress=e.progress
    )
    return report.measures(name)


def _run_minimal_pairs(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    pairs = (MinimalPair(str(r.data.get("set", name)), _field(r, "good", str), _field(r, "bad", str)) for r in records)
    report = minimal_pair_accuracy(
        e.model,
        e.tokenizer,
        pairs,
        e.document_start,
        limit_per_set=limit,
        tokens_per_batch=e.tokens_per_batch,
        progress=e.progress,
    )
    return report.measures(name)


def _run_multiple_choice(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    questions = []
    for record in islice(records, limit):
        query, gold = _field(record, "query", str), _field(record, "gold", int)
        choices = tuple(str(choice) for choice in _field(record, "choices", list))
        try:
            questions.append(ChoiceQuestion(query, choices, gold))
        except ValueError as error:
            raise ValueError(f"{record.path}, line {record.line}: {error}") from None
    report = multiple_choice_accuracy(
        e.model, e.tokenizer, questions, e.document_start, tokens_per_batch=e.tokens_per_batch, progress=e.progress
    )
    return report.measures(name)


def _run_last_word(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    passages = [(_field(r, "context", str), _field(r, "continuation", str)) for r in islice(records, limit)]
    report = last_word_accuracy(
        e.model, e.tokenizer, passages, e.document_start, tokens_per_batch=e.tokens_per_batch, progress=e.progress
    )
    return report.measures(name)


def _run_chat(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    sequences = [encode_chat(e.tokenizer, list(messages_of(record))) for record in islice(records, limit)]
    scores = sequence_logprobs(e.model, sequences, tokens_per_batch=e.tokens_per_batch, progress=e.progress)
    scores = [score for score in scores if score.num_tokens]
    nats, tokens = [-score.logprob for score in scores], [score.num_tokens for score in scores]
    _, error = ratio_and_error(nats, tokens)
    return LossReport(sum(nats), sum(tokens), 0, len(scores), error).measures(f"{name} (assistant tokens)")


def _run_preferences(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    pairs = []
    for record in islice(records, limit):
        prompt, chosen, rejected = preference_of(record)
        pairs.append((list(prompt), list(chosen), list(rejected)))
    report = preference_accuracy(
        e.model,
        lambda messages: encode_chat(e.tokenizer, messages),
        pairs,
        reference=e.reference,
        tokens_per_batch=e.tokens_per_batch,
        progress=e.progress,
    )
    return report.measures(name)


def _run_generate(e: Evaluator, records: Iterable[Record], name: str, limit: int | None) -> list[Measure]:
    prompts, references = [], []
    for record in islice(records, limit):
        prompt, reference = question_and_answer(record)
        prompts.append(prompt)
        references.append(reference)
    replies: list[str] = []
    for start in range(0, len(prompts), 64):  # in portions, so that progress shows
        replies += e.engine.reply_batch(prompts[start : start + 64], e.sampling)
        if e.progress is not None:
            e.progress(len(replies), len(prompts))
    matches = [float(answer_matches(*pair)) for pair in zip(replies, references, strict=True)]
    overlaps = [token_f1(*pair) for pair in zip(replies, references, strict=True)]
    return [measure_of(name, "exact match", matches), measure_of(name, "token F1", overlaps)]


def question_and_answer(record: Record) -> tuple[list[dict[str, str]], str]:
    """Prompt messages and reference answer of a {question, answer, context?} or conversation record."""
    if "question" in record.data:
        question = _field(record, "question", str)
        context = record.data.get("context")
        content = f"{context.strip()}\n\n{question}" if isinstance(context, str) else question
        return [{"role": "user", "content": content}], str(_field(record, "answer", _TEXT_OR_NUMBER))
    messages = list(messages_of(record))
    try:
        return question_of(messages), messages[-1]["content"]
    except ValueError:
        raise ValueError(
            f"{record.path}, line {record.line}: the last message is not the assistant's; expected its "
            "answer there; correct it or leave it out"
        ) from None


_Runner = Callable[[Evaluator, Iterable[Record], str, "int | None"], list[Measure]]
_RUNNERS: Mapping[str, _Runner] = {
    "bits_per_byte": _run_bits_per_byte,
    "blimp": _run_minimal_pairs,
    "multiple_choice": _run_multiple_choice,
    "lambada": _run_last_word,
    "chat": _run_chat,
    "preferences": _run_preferences,
    "generate": _run_generate,
}


def check_task_names(names: Sequence[str]) -> None:
    """Refuse a name that is not a task."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; expected {', '.join(TASKS)}; correct --tasks")
