"""Bugs of the original project and its peers, and the tests that would have caught them: none may come back.

Each entry of `NEVER_AGAIN` tells a bug and names its tests; the test here checks that they are all there. What no
other file tests is tested below.
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# number -> what went wrong, and the tests (file::function, below tests/) that hold us to it
NEVER_AGAIN: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "DPO shifted its log-probabilities twice and scored the token two ahead",
        ("trainer/test_objectives.py::test_log_probs_are_those_of_the_next_token",),
    ),
    2: (
        "DPO's learning rate was 1e-9: training changed nothing, and nobody was told",
        ("trainer/test_run.py::test_the_report_says_how_far_the_weights_moved",),
    ),
    3: (
        "pip could not parse requirements.txt",
        ("test_packaging.py::test_pip_reads_the_requirements",),
    ),
    4: (
        "the tokenizer's folder was missing from the repository",
        (
            "test_never_again.py::test_the_default_tokenizer_is_in_the_repository",
            "tokenizer/test_tokenizer.py::test_default_is_what_the_design_says",
        ),
    ),
    5: (
        "nothing ran without torchrun and NCCL",
        (
            "system/test_runtime.py::test_one_process_on_the_cpu",
            "trainer/test_loop.py::test_eight_at_once_equal_two_processes_with_four",
            "trainer/test_recipes.py::test_torchrun_in_the_original_place",
        ),
    ),
    6: (
        "a compiled module saved its adapter under other names, and strict=False loaded none of them, silently",
        (
            "model/test_lora.py::test_names_come_from_the_uncompiled_module",
            "model/test_lora.py::test_loading_is_strict",
            "checkpoint/test_model_folder.py::test_compiled_models_save_plain_names",
            "trainer/test_run.py::test_a_compiled_run_saves_plain_names",
        ),
    ),
    7: (
        "no warm-up, and weight decay on norms and embeddings",
        (
            "trainer/test_optimizer.py::test_only_matrices_inside_the_blocks_decay",
            "trainer/test_optimizer.py::test_weights_without_decay_stay_when_nothing_pulls_at_them",
            "trainer/test_optimizer.py::test_schedule_by_its_equation",
        ),
    ),
    8: (
        "micro-batches left over at an epoch's end leaked into the next; the loss was a mean of means",
        (
            "trainer/test_loop.py::test_nothing_is_left_over_from_a_step",
            "trainer/test_loop.py::test_the_gradient_is_that_of_the_mean_over_all_targets",
            "trainer/test_run.py::test_an_epoch_has_every_row_once_and_its_last_step_is_its_own",
        ),
    ),
    9: (
        "the seed was set anew at each epoch, which undid the ranks' offsets",
        (
            "trainer/test_run.py::test_ranks_see_other_rows_and_other_dropout_in_every_epoch",
            "dataset/test_batches.py::test_epochs_and_seeds_differ_and_are_repeatable",
        ),
    ),
    10: (
        "a batch with every target masked gave NaN",
        (
            "trainer/test_objectives.py::test_a_batch_without_targets_adds_exactly_nothing",
            "trainer/test_loop.py::test_a_step_without_a_target_changes_nothing",
            "dataset/test_chat_datasets.py::test_a_batch_without_a_target_cannot_occur",
        ),
    ),
    11: (
        "every row was padded to full length, long documents were cut off, and eos was masked because pad == eos",
        (
            "dataset/test_pretrain_dataset.py::test_only_the_last_row_is_padded_and_eos_is_a_target",
            "dataset/test_pretrain_dataset.py::test_rows_rebuild_the_documents_exactly",
            "dataset/test_chat_datasets.py::test_a_batch_of_pairs_is_only_as_wide_as_its_longest_document",
        ),
    ),
    12: (
        "loss masks were found by searching for token patterns, which a user's text can forge",
        ("tokenizer/test_chat_template.py::test_a_message_cannot_forge_a_turn_or_the_mask",),
    ),
    13: (
        "DPO's truncation removed both answers",
        ("dataset/test_chat_datasets.py::test_a_long_prompt_gives_way_and_both_answers_stay",),
    ),
    14: (
        "rotary tables promoted q and k to float32",
        ("model/test_positions_and_cache.py::test_rope_never_promotes_queries_and_keys",),
    ),
    15: (
        "the KV cache grew by concatenation",
        ("model/test_positions_and_cache.py::test_cache_storage_never_moves",),
    ),
    16: (
        "a checkpoint had no config, optimizer, random state or position in the data",
        (
            "trainer/test_run.py::test_resume_is_exact_to_the_bit",
            "trainer/test_run.py::test_a_state_holds_all_a_run_needs_in_full_precision",
            "trainer/test_recipes.py::test_every_stage_trains_and_its_folder_is_the_next_ones_model",
        ),
    ),
    17: (
        "--top_p and --temperature were parsed and ignored",
        (
            "commands/test_chat.py::test_every_sampling_flag_reaches_the_engine",
            "commands/test_chat.py::test_sampling_flags_change_the_answer",
            "trainer/test_recipes.py::test_user_errors_are_one_line_with_status_2",
        ),
    ),
    18: (
        "LoRA skipped k_proj and v_proj",
        ("model/test_lora.py::test_a_fresh_adapter_changes_no_bit_and_covers_all_seven_projections",),
    ),
    19: (
        "a run resumed from half-precision weights",
        (
            "trainer/test_run.py::test_a_state_holds_all_a_run_needs_in_full_precision",
            "checkpoint/test_model_folder.py::test_half_precision_files_load_as_float32_unless_asked",
        ),
    ),
    20: (
        "a packer clogged on over-long chats",
        ("dataset/test_chat_datasets.py::test_over_long_chats_never_clog_the_packer",),
    ),
    21: (
        "the step counter counted micro-batches, so the schedule ran past its end",
        (
            "trainer/test_loop.py::test_the_schedule_counts_optimizer_steps",
            "trainer/test_run.py::test_the_schedule_ends_at_a_tenth_of_its_peak_with_accumulation",
        ),
    ),
}


def test_all_are_accounted_for():
    assert list(NEVER_AGAIN) == list(range(1, 22))


@pytest.mark.parametrize("number", NEVER_AGAIN)
def test_its_tests_are_there_and_check_something(number):
    bug, names = NEVER_AGAIN[number]
    for name in names:
        file, _, function = name.partition("::")
        found = functions_of(TESTS / file).get(function)
        assert found is not None, f"{bug}: {name} is gone; restore it, or name the test that took its place"
        assert checks_something(found), f"{bug}: {name} asserts nothing"
        assert not any("pytest.mark.skip(" in ast.unparse(mark) for mark in found.decorator_list), f"{name} is skipped"


def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def checks_something(function: ast.FunctionDef) -> bool:
    words = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return bool(words & {"raises", "assert_close"}) or any(isinstance(n, ast.Assert) for n in ast.walk(function))


def test_a_missing_test_is_noticed(tmp_path):
    file = tmp_path / "test_a.py"
    file.write_text("def test_one():\n    assert True\n\n\ndef test_two():\n    print('ran')\n")
    functions = functions_of(file)
    assert list(functions) == ["test_one", "test_two"] and functions_of(tmp_path / "gone.py") == {}
    assert checks_something(functions["test_one"]) and not checks_something(functions["test_two"])


def test_the_default_tokenizer_is_in_the_repository(repository: Path):
    """The original project's default paths named a tokenizer folder that was not in its repository: no command ran.

    Ours has every file, git does not ignore it, and the package carries it.
    """
    folder = repository / "tinylm" / "tokenizer" / "default"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).stat().st_size > 0
        if (repository / ".git").exists():
            command = ["git", "check-ignore", "--no-index", "--quiet", str(folder / name)]
            done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
            assert done.returncode == 1, f"git ignores {name}: {done.stderr}"
    assert '"tokenizer/default/*"' in (repository / "pyproject.toml").read_text(encoding="utf-8")
