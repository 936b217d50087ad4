"""Chats and pairs in rows: what is scored, what is cut, and that nothing else is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinylm.dataset.batches import IGNORE_INDEX, BatchSampler, step_batches
from tinylm.dataset.dpo_dataset import DPODataset
from tinylm.dataset.sft_dataset import Outcomes, SFTDataset
from tinylm.dataset.splits import hold_out_items
from tinylm.tokenizer.chat_template import encode_chat


def chat(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]


def scored(batch) -> dict[int, list[int]]:
    """Targets of each document of a batch."""
    found: dict[int, list[int]] = {}
    for document, target in zip(batch.document_ids.flatten().tolist(), batch.targets.flatten().tolist(), strict=True):
        if target != IGNORE_INDEX:
            found.setdefault(document, []).append(target)
    return found


def batches(dataset, batch_size: int, seed: int = 0):
    sampler = BatchSampler(len(dataset), batch_size, batch_size, seed)
    return (batch for (batch,) in step_batches(dataset, sampler))


def expected_targets(tokenizer, messages) -> list[int]:
    ids, mask = encode_chat(tokenizer, messages)
    return [token for token, flag in zip(ids, mask, strict=True) if flag]


def test_only_the_assistant_is_scored_and_no_chat_is_lost(tokenizer) -> None:
    chats = [chat(f"What is {n}?", f"It is {'so ' * (n % 9)}{n}.", "And?", "No more.") for n in range(40)]
    dataset = SFTDataset.from_conversations(chats, tokenizer, 300)
    assert len(dataset) < 40
    found = []
    for batch in batches(dataset, 4):
        found += scored(batch).values()
    assert sorted(found) == sorted(expected_targets(tokenizer, messages) for messages in chats)
    assert dataset.num_targets == sum(map(len, found))


def test_the_shift_is_by_one_within_each_chat(tokenizer) -> None:
    chats = [chat("Boat?", "Sea."), chat("The sea?", "The boat sailed.")]
    dataset = SFTDataset.from_conversations(chats, tokenizer, 200)
    row = dataset.row(0)
    streams = {tuple(encode_chat(tokenizer, messages)[0]) for messages in chats}
    for document in range(2):
        inside = row.document_ids == document
        inputs, targets = row.input_ids[inside], row.targets[inside]
        ids = next(stream for stream in streams if stream[: len(inputs)] == tuple(inputs))
        kept = targets != IGNORE_INDEX
        assert targets[kept].tolist() == np.array(ids[1:])[: len(inputs)][kept].tolist()
        assert row.position_ids[inside].tolist() == list(range(len(inputs)))
        assert targets[-1] == tokenizer.im_end_id  # what follows the last answer is not there


def test_an_over_long_chat_is_cut_after_a_whole_answer(tokenizer) -> None:
    messages = chat("one", "two", "three", "four " * 30)
    first = expected_targets(tokenizer, messages[:2])
    dataset = SFTDataset.from_conversations([messages], tokenizer, 60)
    assert dataset.outcomes.num_cut == 1 and dataset.outcomes.num_dropped == 0
    assert list(scored(dataset.collate([dataset.row(0)])).values()) == [first]


def test_the_cut_keeps_all_that_fits_and_not_a_token_more(tokenizer) -> None:
    messages = chat("one", "two", "three", "four", "five", "six")
    ends = [len(encode_chat(tokenizer, messages[: 2 * n])[0]) - 2 for n in (1, 2, 3)]  # positions, no newline
    for row_length in range(ends[0], ends[2] + 2):
        dataset = SFTDataset.from_conversations([messages], tokenizer, row_length)
        assert len(dataset.row(0)) == max(end for end in ends if end <= row_length)


def test_an_answer_longer_than_a_row_is_cut_inside(tokenizer) -> None:
    messages = chat("one", "four " * 60)
    dataset = SFTDataset.from_conversations([messages], tokenizer, 50)
    assert len(dataset.row(0)) == 50
    targets = next(iter(scored(dataset.collate([dataset.row(0)])).values()))
    assert targets == expected_targets(tokenizer, messages)[: len(targets)] and len(targets) > 20


def test_over_long_chats_never_clog_the_packer(tokenizer) -> None:
    """A packer once waited for room that could never come, once its buffer held only over-long chats."""
    chats = [chat("why " * 200, "because")] * 50 + [chat("Hi", "word " * 200)] * 50 + [chat("Hi", "Ho")] * 5
    dataset = SFTDataset.from_conversations(chats, tokenizer, 64)
    assert dataset.outcomes.num_seen == 105
    assert dataset.outcomes.num_cut == 50 and dataset.outcomes.num_dropped == 50
    assert sum(batch.count for batch in batches(dataset, 2)) == dataset.num_targets


def test_a_batch_without_a_target_cannot_occur(tokenizer) -> None:
    """It once made the loss NaN: a question that fills the row leaves nothing to score."""
    chats = [chat("why " * n, "because") for n in range(1, 60)]
    dataset = SFTDataset.from_conversations(chats, tokenizer, 48)
    assert 0 < dataset.outcomes.num_dropped < len(chats)
    assert all(dataset.row(index).num_targets > 0 for index in range(len(dataset)))
    with pytest.raises(ValueError, match="none of the 1 conversations.*raise --max_seq_len"):
        SFTDataset.from_conversations([chat("why " * 99, "because")], tokenizer, 48)


def test_worker_processes_give_the_same_data(tokenizer) -> None:
    chats = [chat(f"Say {n}.", f"{n}!") for n in range(4_100)]
    alone = SFTDataset.from_conversations(chats, tokenizer, 128, num_processes=0)
    done: list[int] = []
    together = SFTDataset.from_conversations(chats, tokenizer, 128, num_processes=2, progress=done.append)
    assert alone.fingerprint == together.fingerprint and done == [2000, 4000, 4100]
    other = SFTDataset.from_conversations(chats[1:], tokenizer, 128)
    assert other.fingerprint != alone.fingerprint


def pair(prompt: list[str], chosen: str, rejected: str):
    return chat(*prompt), *([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))


def test_pairs_share_a_batch_and_only_answers_are_scored(tokenizer) -> None:
    pairs = [pair(["Hi", "Yes?", f"Say {n}"], f"{n} " * (n + 1), "no") for n in range(11)]
    dataset = DPODataset.from_preferences(pairs, tokenizer, 200)
    reference = np.arange(22, dtype=np.float32).reshape(11, 2)
    dataset.attach_reference_log_probs(reference)
    order = np.concatenate(list(dataset_order(dataset)))
    seen = 0
    for batch in batches(dataset, 4, seed=5):
        found = scored(batch)
        assert sorted(found) == list(range(2 * batch.count))
        for number in range(batch.count):
            source = int(order[seen])
            prompt, chosen, rejected = pairs[source]
            assert found[2 * number] == expected_targets(tokenizer, chosen)
            assert found[2 * number + 1] == expected_targets(tokenizer, rejected)
            assert batch.extras["reference_log_probs"][number].tolist() == reference[source].tolist()
            inside = batch.document_ids == 2 * number
            ids = encode_chat(tokenizer, prompt + chosen)[0]
            assert batch.input_ids[inside].tolist() == ids[: int(inside.sum())]
            seen += 1
    assert seen == 11


def dataset_order(dataset: DPODataset):
    return (rows for (rows,) in BatchSampler(len(dataset), 4, 4, 5).steps(0))


def test_a_batch_of_pairs_is_only_as_wide_as_its_longest_document(tokenizer) -> None:
    dataset = DPODataset.from_preferences([pair(["a"], "b", "c"), pair(["a"], "b " * 40, "c")], tokenizer, 400)
    lengths = dataset.documents.lengths - 1
    batch = dataset.collate([dataset.row(0), dataset.row(1)])
    assert batch.input_ids.shape[1] == lengths.max() and batch.count == 2
    assert batch.without_targets().count == 0
    assert torch.equal(batch.document_ids.unique(), torch.tensor([-1, 0, 1, 2, 3]))


def test_a_long_prompt_gives_way_and_both_answers_stay(tokenizer) -> None:
    """Truncation once removed both answers: the loss was log 2 for ever."""
    turns = ["old " * 60, "well", "And now?"]
    dataset = DPODataset.from_preferences([pair(turns, "yes " * 20, "no " * 15)], tokenizer, 120)
    assert dataset.outcomes.num_cut == 1
    (chosen, chosen_mask), (rejected, rejected_mask) = dataset.row(0).chosen, dataset.row(0).rejected
    start, other = int(chosen_mask.argmax()), int(rejected_mask.argmax())
    assert chosen[:start].tolist() == rejected[:other].tolist()  # the same prompt
    assert "And now?" in tokenizer.decode(chosen[:start]) and "old" not in tokenizer.decode(chosen[:start])
    assert "yes yes" in tokenizer.decode(chosen[start:]) and "no no" in tokenizer.decode(rejected[other:])
    assert chosen[-1] == rejected[-1] == tokenizer.im_end_id


def test_long_answers_are_cut_and_the_prompt_stays(tokenizer) -> None:
    dataset = DPODataset.from_preferences([pair(["Why?"], "yes " * 99, "no")], tokenizer, 60)
    assert dataset.documents.lengths.tolist()[0] == 61 and dataset.outcomes.num_cut == 1
    assert dataset.documents.document(0)[1].sum() > 32


def test_pairs_without_a_difference_are_dropped_and_counted(tokenizer) -> None:
    same = "yes " * 99
    pairs = [
        pair(["Why?"], "yes", "yes"),
        pair(["Why?"], same + "a", same + "b"),
        pair(["w " * 99], "yes", "no"),
        pair(["Why?"], "yes", "no"),
    ]
    dataset = DPODataset.from_preferences(pairs, tokenizer, 60)
    assert len(dataset) == 1
    assert dataset.outcomes == Outcomes(num_seen=4, num_cut=0, num_dropped=2, num_equal=1)


def test_why_no_pair_can_be_learnt(tokenizer) -> None:
    same, long = pair(["Why?"], "yes", "yes"), pair(["w " * 99], "yes", "no")
    with pytest.raises(ValueError, match="chosen and rejected are equal in all 2 pairs; expected two different"):
        DPODataset.from_preferences([same, same], tokenizer, 60)
    with pytest.raises(ValueError, match="equal in 1 pairs, and none of the 2 others has an answer that fits into 60"):
        DPODataset.from_preferences([same, long, long], tokenizer, 60)


def test_only_what_can_be_learnt_is_held_out(tokenizer) -> None:
    """With these seeds the only held-out item was the one without an answer that fits, and the run was refused."""
    chats = [chat("Sag 0", f"Es ist {number}.") for number in range(9)] + [chat("w " * 200, "Ja.")]
    pairs = [pair(["Hi"], "Hallo!", "Geh."), pair(["Bye"], "Tschüs!", "Geh."), pair(["Ok"], "Ja", "Ja")]
    for seed in range(12):
        train, held = SFTDataset.from_conversations(chats, tokenizer, 64).split(0.01, seed)
        assert held is not None and (len(train.documents), len(held.documents)) == (8, 1)
        train, held = DPODataset.from_preferences(pairs, tokenizer, 64).split(0.01, seed)
        assert held is not None and (len(train), len(held)) == (1, 1)


def test_a_split_contains_every_chat_once_and_in_order(tokenizer) -> None:
    chats = [chat("Sag es", "Ä" * number) for number in range(1, 20)]
    whole = SFTDataset.from_conversations(chats, tokenizer, 64)
    train, held = whole.split(0.2, seed=3)
    kept, out = hold_out_items(chats, 0.2, seed=3)
    assert held is not None and len(out) == 4
    for part, items in ((train, kept), (held, out)):
        alone = SFTDataset.from_conversations(items, tokenizer, 64)
        assert part.fingerprint == alone.fingerprint and part.width == alone.width
    assert whole.split(0.0, seed=3) == (whole, None)


def test_one_item_is_not_held_out(tokenizer) -> None:
    whole = SFTDataset.from_conversations([chat("a", "b")], tokenizer, 64)
    assert whole.split(0.5, seed=0) == (whole, None)
    pairs = DPODataset.from_preferences([pair(["a"], "b", "c")], tokenizer, 64)
    assert pairs.split(0.5, seed=0) == (pairs, None)


def test_reference_log_probs_are_checked(tokenizer) -> None:
    dataset = DPODataset.from_preferences([pair(["a"], "b", "c")], tokenizer, 60)
    with pytest.raises(ValueError, match=r"shape \(3, 2\); expected \(1, 2\)"):
        dataset.attach_reference_log_probs(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="not finite"):
        dataset.attach_reference_log_probs(np.array([[0.0, np.nan]]))
