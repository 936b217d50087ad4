"""The terminal chat: which model it takes, what it remembers, and that every flag reaches the engine."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint.saved_states import save_state
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.commands import chat as inference
from tinylm.commands.chat import Chat, ChatSettings, find_model, main
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.generation.history import fit_history
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)
QUESTIONS = [{"role": "user", "content": f"question {i} " + "word " * 6} for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox asks a question word by word, naïve and 日本 " * 20], vocab_size=330)


def make_model(tokenizer: Tokenizer, seed: int = 0) -> TinyLMForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    config = TinyLMConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, **shape)
    return TinyLMForCausalLM(config).eval()


@pytest.fixture(scope="module")
def out(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three models, the oldest first."""
    folder = tmp_path_factory.mktemp("out")
    names = ("pretrain_32_epoch1", "full_sft_32_epoch1", "full_sft_32_epoch2", "dpo_32_epoch0")
    for number, name in enumerate(names):
        model = make_model(tokenizer, number)
        save_model(folder / name, model, tokenizer, {"stage": name.split("_32")[0]})
        os.utime(folder / name, (1000 + number, 1000 + number))
    return folder


@pytest.fixture
def chat(tokenizer: Tokenizer) -> Chat:
    chat = Chat(Engine(make_model(tokenizer, seed=3), tokenizer, torch.float32), GREEDY)
    assert chat.engine.reply([{"role": "user", "content": "the quick"}], GREEDY), "a model that says something"
    return chat


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in (*argv, "--device", "cpu", "--dtype", "float32")]) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- which model


@pytest.mark.parametrize(
    ("weight", "expected"),
    [("", "dpo_32_epoch0"), ("full_sft", "full_sft_32_epoch2"), ("pretrain", "pretrain_32_epoch1")],
)
def test_weight_picks_the_newest_of_its_kind(out: Path, weight: str, expected: str) -> None:
    assert find_model(str(out), weight).name == expected
    assert find_model(str(out / expected), weight) == out / expected


def test_weight_that_is_not_there_names_what_is(out: Path) -> None:
    with pytest.raises(ValueError, match="full_sft_32_epoch1.*expected a model named lora_"):
        find_model(str(out), "lora")


def test_default_is_the_quickstarts_last_stage_then_the_newest(out: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run `tinylm quickstart` first"):
        find_model("", "")
    shutil.copytree(out, tmp_path / "out" / "mine")
    os.utime(tmp_path / "out/mine/full_sft_32_epoch2", (9e9, 9e9))
    assert find_model("", "").name == "full_sft_32_epoch2"
    shutil.copytree(out, tmp_path / "out" / "quickstart")
    os.utime(tmp_path / "out/quickstart/pretrain_32_epoch1", (9e9, 9e9))
    assert find_model("", "") == Path("out/quickstart/dpo_32_epoch0")
    assert find_model("", "pretrain") == Path("out/quickstart/pretrain_32_epoch1")


def test_the_quickstarts_models_lie_one_folder_deeper(out: Path, tmp_path: Path, monkeypatch) -> None:
    """Each stage writes into a folder of its own; `tinylm chat` said that there was no model."""
    monkeypatch.chdir(tmp_path)
    for stage in ("pretrain", "full_sft"):
        for model in out.glob(f"{stage}_*"):
            shutil.copytree(model, tmp_path / "out" / "quickstart" / stage / model.name)
    os.utime(tmp_path / "out/quickstart/pretrain/pretrain_32_epoch1", (9e9, 9e9))
    assert find_model("", "") == Path("out/quickstart/full_sft/full_sft_32_epoch2")
    assert find_model("", "pretrain") == Path("out/quickstart/pretrain/pretrain_32_epoch1")
    (tmp_path / "out" / "quickstart").rename(tmp_path / "out" / "mine")
    assert find_model("", "") == Path("out/mine/pretrain/pretrain_32_epoch1")


def test_a_folder_of_stages_means_the_last_stage(out: Path, tmp_path: Path) -> None:
    for stage in ("pretrain", "full_sft"):
        shutil.copytree(out / f"{stage}_32_epoch1", tmp_path / "größe" / stage / f"{stage}_32_epoch1")
    os.utime(tmp_path / "größe/pretrain/pretrain_32_epoch1", (9e9, 9e9))
    assert find_model(str(tmp_path / "größe"), "").name == "full_sft_32_epoch1"
    assert find_model(str(tmp_path / "größe"), "pretrain").name == "pretrain_32_epoch1"


def stopped_run(folder: Path, stage: str = "full_sft", step: int = 7, num_steps: int = 230) -> None:
    state = {"step": step, "identity": {"stage": stage, "num_steps": num_steps}}
    save_state(folder / f"{stage}_32_state", state)


@pytest.mark.parametrize(("stage", "command"), [("full_sft", "sft"), ("pretrain", "pretrain")])
def test_the_folder_of_a_stopped_run_says_how_to_continue(
    tmp_path: Path, monkeypatch, stage: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped_run(Path("out/mein"), stage)
    says = rf"run stopped at step 7 of 230; continue with .*tinylm {command} --output_dir out/mein --resume"
    with pytest.raises(ValueError, match=f"out/mein holds no model yet: its {stage} {says}"):
        find_model("out/mein", "")
    with pytest.raises(ValueError, match=f"no model under ./out; its {stage} {says}"):
        find_model("", "")
    stopped_run(Path("out/mein"), stage, step=230)
    with pytest.raises(ValueError, match="out/mein holds no model; expected config.json"):
        find_model("out/mein", "")


def test_a_model_of_an_unfinished_run_is_taken_with_a_notice(out: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(out / "full_sft_32_epoch1", tmp_path / "full_sft_32_epoch1")
    stopped_run(tmp_path)
    assert main(["--model_path", str(tmp_path), "--prompt", "the", "--max_new_tokens", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert f"model: {tmp_path / 'full_sft_32_epoch1'}\n" in said
    assert "full_sft_32_epoch1: its full_sft run stopped at step 7 of 230; continue with" in said


def test_shape_flags_must_match(out: Path, capsys) -> None:
    with pytest.raises(ValueError, match="hidden_size is 512, but .* has 32"):
        main(["--model_path", str(out), "--hidden_size", "512", "--prompt", "x"])
    assert run(capsys, "--model_path", out, "--hidden_size", 32, "--num_hidden_layers", 2, "--prompt", "x")


# --------------------------------------------------------------------------------------------------------- answers


def expected_answer(out: Path, name: str, text: str, settings: SamplingSettings) -> str:
    model, tokenizer, _ = load_model(out / name)
    return Engine(model, tokenizer, torch.float32).reply([{"role": "user", "content": text}], settings)


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.0, "max_new_tokens": 5},
        {"temperature": 0.0, "repetition_penalty": 1.8},
        {"temperature": 0.0, "num_beams": 3},
        {"temperature": 0.0, "num_beams": 3, "length_penalty": -3.0},
        {"temperature": 1.9, "top_p": 1.0, "seed": 5},
        {"temperature": 1.9, "top_p": 1.0, "top_k": 3, "seed": 5},
        {"temperature": 1.9, "top_p": 0.3, "seed": 5},
        {"temperature": 1.9, "top_p": 1.0, "min_p": 0.4, "seed": 5},
        {"temperature": 1.9, "top_p": 1.0, "seed": 6},
    ],
)
def test_every_sampling_flag_reaches_the_engine(out: Path, capsys, flags: dict) -> None:
    flags = {"max_new_tokens": 20, **flags}
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    said = run(capsys, "--model_path", out, "--prompt", "the quick question", *argv)
    assert said == expected_answer(out, "dpo_32_epoch0", "the quick question", SamplingSettings(**flags)) + "\n"


def test_sampling_flags_change_the_answer(out: Path) -> None:
    """What the test above compares would be worth little if the settings all led to one answer."""
    base = {"max_new_tokens": 20, "temperature": 1.9, "top_p": 1.0, "seed": 5}
    variants = [base, *({**base, **one} for one in ({"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {"seed": 6}))]
    answers = {expected_answer(out, "dpo_32_epoch0", "the quick", SamplingSettings(**v)) for v in variants}
    assert len(answers) == len(variants)


def test_base_model_continues_the_text(out: Path, capsys) -> None:
    argv = ("--temperature", 0, "--max_new_tokens", 8, "--prompt", "the quick")
    said = run(capsys, "--model_path", out, "--weight", "pretrain", *argv)
    model, tokenizer, _ = load_model(out / "pretrain_32_epoch1")
    settings = SamplingSettings(temperature=0.0, max_new_tokens=8)
    ids = list(Engine(model, tokenizer, torch.float32).generate(tokenizer.encode("the quick"), settings))
    assert said == "the quick" + tokenizer.decode(ids) + "\n"
    assert run(capsys, "--model_path", out / "pretrain_32_epoch1", *argv) == said, "the lineage says so as well"


def test_adapter_is_merged_in(out: Path, tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    base = out / "full_sft_32_epoch2"
    model, _, _ = load_model(base)
    apply_lora(model, LoRAConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, tmp_path / "adapter", base)
    argv = ("--model_path", base, "--temperature", 0, "--max_new_tokens", 12, "--prompt", "the quick")
    said = run(capsys, *argv, "--adapter", tmp_path / "adapter")
    engine = Engine(model, tokenizer, torch.float32)
    assert said == engine.reply([{"role": "user", "content": "the quick"}], GREEDY) + "\n"
    assert said != run(capsys, *argv)
    shutil.copytree(tmp_path / "adapter", tmp_path / "runs" / "lora_32_epoch0")
    change_json(tmp_path / "runs/lora_32_epoch0/adapter_config.json", base_model_name_or_path=str(base))
    assert said == run(capsys, *argv, "--adapter", tmp_path / "runs"), "a stage's output folder is taken too"
    with pytest.raises(ValueError, match="full_sft_32_epoch2 is a full model; expected an adapter folder"):
        main(["--model_path", str(base), "--adapter", str(base), "--prompt", "x"])
    with pytest.raises(
        ValueError, match=r"was trained on .*; .*pretrain_32_epoch1 has weights .* --model_path .* alone"
    ):
        main(["--model_path", str(out / "pretrain_32_epoch1"), "--adapter", str(tmp_path / "runs"), "--prompt", "x"])
    (tmp_path / "adapter/lineage.json").unlink()
    change_json(tmp_path / "adapter/adapter_config.json", r=3)
    with pytest.raises(
        ValueError, match=r"does not fit .*epoch2; it was trained on .*epoch2: give that model .*\[4, 32\]"
    ):
        main(["--model_path", str(base), "--adapter", str(tmp_path / "adapter"), "--prompt", "x"])


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_prompt_is_refused(out: Path, blank: str, monkeypatch) -> None:
    """It counted as none: chat then waited for standard input."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="^prompt holds no text; expected some to answer"):
        main(["--model_path", str(out), "--prompt", blank])


def test_a_base_model_begins_a_text_from_nothing(out: Path, tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    """If it learnt how documents begin: an older one has nothing to begin with."""
    old = out / "pretrain_32_epoch1"
    with pytest.raises(ValueError, match="^prompt holds no text"):
        run(capsys, "--model_path", old, "--prompt", "")
    lineage = {"stage": "pretrain", "document_start": True}
    save_model(tmp_path / "pretrain_32_epoch0", make_model(tokenizer, 0), tokenizer, lineage)
    said = run(capsys, "--model_path", tmp_path, "--prompt", "", "--temperature", "0", "--max_new_tokens", "5")
    model, _, _ = load_model(tmp_path / "pretrain_32_epoch0")
    settings = SamplingSettings(max_new_tokens=5, temperature=0.0)
    ids = list(Engine(model, tokenizer, torch.float32).generate([tokenizer.endoftext_id], settings))
    assert said == tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("lines", ["", "\n \n"])
def test_empty_standard_input_is_refused(out: Path, lines: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(ValueError, match="standard input is empty; expected one question per line; or give --prompt"):
        main(["--model_path", str(out)])


def test_a_context_too_short_for_a_question_is_named_at_the_start(out: Path, capsys) -> None:
    """The message blamed max_new_tokens."""
    with pytest.raises(ValueError, match=r"expected a context of at least \d+ tokens; raise max_seq_len") as error:
        main(["--model_path", str(out), "--max_seq_len", "2", "--prompt", "x"])
    least = re.search(r"at least (\d+)", str(error.value))[1]
    run(capsys, "--model_path", out, "--max_seq_len", least, "--prompt", "x")


def test_stdin_is_answered_line_by_line(out: Path, capsys, monkeypatch) -> None:
    lines = "the quick\n\n   \n/reset\nthe quick\nexit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    said = run(capsys, "--model_path", out, "--temperature", 0, "--max_new_tokens", 6)
    answer = expected_answer(out, "dpo_32_epoch0", "the quick", SamplingSettings(temperature=0.0, max_new_tokens=6))
    assert said == f"{answer}\n{answer}\n"


def test_runs_as_a_script_through_a_link_from_any_folder(out: Path, repository: Path, tmp_path: Path) -> None:
    """As in a fresh clone: `tinylm` is found from where the file really is."""
    link = tmp_path / "inference.py"
    link.symlink_to(repository / "inference.py")
    command = [sys.executable, str(link), "--model_path", str(out), "--prompt", "the quick", "--max_new_tokens", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, f"model: {out / 'dpo_32_epoch0'}\n"), "it says which of several"
    command[3] = str(out / "dpo_32_epoch0")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    command[3] = str(tmp_path / "nowhere")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "nowhere" in result.stderr and result.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------- the conversation


def test_conversation_is_remembered_and_reset(chat: Chat) -> None:
    first = "".join(chat.answer("the quick"))
    second = "".join(chat.answer("and then?"))
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] == first
    assert second == chat.engine.reply(chat.messages[:3], GREEDY)
    chat.command("/reset")
    assert "".join(chat.answer("the quick")) == first


def test_system_command_changes_the_answer(chat: Chat) -> None:
    plain = "".join(chat.answer("the quick"))
    chat.command("/system be a brown fox")
    message = [{"role": "system", "content": "be a brown fox"}, {"role": "user", "content": "the quick"}]
    told = "".join(chat.answer("the quick"))
    assert told == chat.engine.reply(message, GREEDY) and told != plain
    chat.command("/system")
    assert "".join(chat.answer("the quick")) == plain


def test_commands(chat: Chat) -> None:
    assert chat.command("/exit") is None
    assert "/reset" in str(chat.command("/help"))
    assert "unknown command /nonsense" in str(chat.command("/nonsense"))


def test_stopped_answer_is_remembered_as_far_as_it_came(chat: Chat) -> None:
    answer = chat.answer("the quick")
    piece = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece}


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(chat: Chat, capsys, monkeypatch) -> None:
    lines = iter(["the quick", KeyboardInterrupt(), "again", EOFError()])

    def fake_input(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    def interrupted(text: str):
        yield "half"
        if text == "the quick":
            raise KeyboardInterrupt
        yield " whole"

    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr(chat, "answer", interrupted)
    inference._converse(chat, inference.Console(stderr=True))
    captured = capsys.readouterr()
    assert captured.out == "halfhalf whole\n\n"
    assert "stopped" in captured.err


def test_long_conversation_never_overflows(chat: Chat) -> None:
    notices: list[str] = []
    chat.notify = notices.append
    chat.system = "be brief"
    for question in QUESTIONS:
        "".join(chat.answer(question["content"]))
        assert len(chat.messages) <= 6
    assert notices and all("oldest messages" in notice for notice in notices)
    "".join(chat.answer("word " * 500))
    assert "tokens of a long message" in notices[-1]


# -------------------------------------------------------------------------------------------------------- history


def test_history_drops_whole_exchanges_and_keeps_the_system_message(tokenizer: Tokenizer) -> None:
    system = {"role": "system", "content": "be brief"}
    turns = [m for q in QUESTIONS for m in (q, {"role": "assistant", "content": "word"})][:-1]
    whole = fit_history(tokenizer, [system, *turns], 10_000)
    assert (whole.dropped_messages, whole.cut_tokens, whole.notice) == (0, 0, "")
    for budget in range(60, len(whole.ids)):
        fitted = fit_history(tokenizer, [system, *turns], budget)
        assert len(fitted.ids) <= budget and fitted.dropped_messages % 2 == 0 and fitted.cut_tokens == 0
        kept = [system, *turns[fitted.dropped_messages :]]
        assert fitted.ids == fit_history(tokenizer, kept, 10_000).ids
        more = [system, *turns[max(0, fitted.dropped_messages - 2) :]]
        assert fitted.dropped_messages == 0 or len(fit_history(tokenizer, more, 10_000).ids) > budget


def test_one_long_message_keeps_its_tail(tokenizer: Tokenizer) -> None:
    text = " ".join(f"word{i} 日本" for i in range(200))
    for budget in (40, 57, 100):
        fitted = fit_history(tokenizer, [{"role": "user", "content": text}], budget)
        shown = tokenizer.decode(fitted.ids)
        assert budget - 8 <= len(fitted.ids) <= budget and fitted.cut_tokens > 0
        assert "word199 日本" in shown and "\ufffd" not in shown and "word0 " not in shown


def test_long_system_message_is_cut_rather_than_the_question(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "fox " * 300}, {"role": "user", "content": "the quick question"}]
    fitted = fit_history(tokenizer, messages, 80)
    assert len(fitted.ids) <= 80 and "the quick question" in tokenizer.decode(fitted.ids)


def test_context_shorter_than_the_template_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the chat template alone takes"):
        fit_history(tokenizer, QUESTIONS[:1], 5)


# ------------------------------------------------------------------------------------------------- text of the engine


def test_stream_never_breaks_a_character(tokenizer: Tokenizer, monkeypatch) -> None:
    engine = Engine(make_model(tokenizer), tokenizer, torch.float32)
    text = "日本 naïve 🦊"
    tokens = [_byte_token(tokenizer, byte) for byte in text.encode()]
    monkeypatch.setattr(engine, "generate", lambda ids, settings, stop_ids: iter(tokens))
    pieces = list(engine.stream_text([5], GREEDY))
    assert "".join(pieces) == text and all(len(piece) == 1 for piece in pieces)


@pytest.mark.parametrize("stop", [0, 2])
def test_reply_ends_at_either_stop_token(tokenizer: Tokenizer, stop: int) -> None:
    """A document's end ends a reply as a message's end does; neither is shown."""
    model = make_model(tokenizer)
    said = [*tokenizer.encode("naïve 日本"), stop, *tokenizer.encode("never said")]
    script = iter(said)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(script)]), tokenizer.vocab_size).float()

    del model.lm_head
    model.lm_head = head
    engine = Engine(model, tokenizer, torch.float32)
    assert engine.reply([{"role": "user", "content": "the quick"}], SamplingSettings(temperature=0.0)) == "naïve 日本"
    assert set(engine.stop_ids) == {0, 2}


def _byte_token(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))


def test_reply_batch_equals_reply(tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(tokenizer), tokenizer, torch.float32)
    conversations = [[question] for question in QUESTIONS] + [QUESTIONS[:1] * 30]
    replies = engine.reply_batch(conversations, GREEDY, batch_size=4)
    assert replies == [engine.reply(conversation, GREEDY) for conversation in conversations]


def test_settings_refuse_contradictions() -> None:
    with pytest.raises(ValueError, match="hidden_size is -1"):
        ChatSettings(hidden_size=-1)
    with pytest.raises(ValueError, match="takes no instructions"):
        ChatSettings(weight="pretrain", system="be brief")
