"""TinyWorld: determinism, held-out pairs, checkable answers, English."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from tinylm.dataset import tinyworld as tw
from tinylm.dataset.tinyworld.chats import WARM_OPENERS
from tinylm.dataset.tinyworld.plots import NOT_IN_STORY, all_facts, ask, make_story
from tinylm.dataset.tinyworld.story_check import is_story
from tinylm.dataset.tinyworld.words import (
    COLOURS,
    FEELINGS,
    NAMES,
    PLACES,
    THINGS,
    reserved,
    reserved_unordered,
    stream,
)

CLOSED_PAIRS = {"addition": "plus", "subtraction": "minus"}
GOLDEN = "8720cd7658772581"


def exam(skill: str, n: int = 200, split: str = "test") -> list[tw.Item]:
    return [tw.test_item(skill, i, split) for i in range(n)]


def prompt_text(item: tw.Item) -> str:
    return "\n".join(message["content"] for message in item.messages[:-1])


def names_and_things(text: str) -> tuple[set[str], set[str]]:
    words = set(re.findall(r"[A-Za-z]+", text))
    return words & set(NAMES), words & set(THINGS)


def test_items_do_not_change_between_releases():
    """A published accuracy refers to exactly these items."""
    digest = hashlib.sha256()
    for i in range(50):
        digest.update(tw.pretrain_document(i).encode())
        digest.update(repr(tw.conversation(i)).encode())
        digest.update(repr(tw.preference_pair(i)).encode())
        digest.update(repr(tw.persona_conversation(i)).encode())
        for skill in tw.SKILLS:
            digest.update(repr(tw.test_item(skill, i)).encode())
    assert digest.hexdigest()[:16] == GOLDEN


def test_items_depend_on_seed_split_and_index_only():
    assert tw.conversation(7) == tw.conversation(7)
    different = {repr(item) for item in (tw.conversation(7), tw.conversation(8), tw.conversation(7, seed=1))}
    assert len(different) == 3
    assert tw.pretrain_document(7, "train") != tw.pretrain_document(7, "test")
    assert list(tw.pretrain_documents(3))[2] == tw.pretrain_document(2)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="split 'dev'"):
        tw.conversation(0, split="dev")
    with pytest.raises(ValueError, match="skill 'cooking'"):
        tw.conversation(0, skill="cooking")
    with pytest.raises(ValueError, match="at least 0"):
        tw.pretrain_document(-1)


def test_train_and_test_share_no_document():
    train = set(tw.pretrain_documents(10_000, "train"))
    assert train.isdisjoint(tw.pretrain_documents(10_000, "test"))


def test_no_exam_prompt_is_a_training_prompt():
    """Every prefix that a training chat asks to answer, against all exam prompts without history."""
    train = {
        message["content"]
        for item in tw.conversations(10_000)
        for message in item.messages
        if message["role"] == "user"
    }
    for skill in tw.SKILLS:
        for item in exam(skill, 550):
            if len(item.messages) == 2:
                assert item.messages[0]["content"] not in train


def test_train_text_never_joins_a_reserved_name_and_thing():
    texts = [document.split("\n")[0] for document in tw.pretrain_documents(3000)]
    stories = [text for text in texts if " feel" in text or " was " in text]
    assert len(stories) > 1000
    for text in stories:
        people, things = names_and_things(text)
        assert not any(reserved("has", name, thing) for name in people for thing in things), text


@pytest.mark.parametrize("skill", tw.STORY_QUESTION_SKILLS)
def test_exam_stories_always_join_a_reserved_name_and_thing(skill):
    for item in exam(skill):
        people, things = names_and_things(item.messages[0]["content"])
        assert any(reserved("has", name, thing) for name in people for thing in things)
        if skill == "who_has":
            (name,), (thing,) = names_and_things(item.accepted[0])
            assert reserved("has", name, thing)


def test_write_story_words_hold_a_reserved_pair_in_the_exam_only():
    for split in ("train", "test"):
        for item in exam("write_story", 200, split):
            people, things = names_and_things(" ".join(item.words))
            pairs = [reserved("has", name, thing) for name in people for thing in things]
            assert bool(pairs) == bool(item.words) and any(pairs) == (split == "test")


def test_a_story_with_words_names_all_its_people_and_a_free_one_is_asked_for_in_training_only():
    """ "Tell me a story." was never asked in training, and was answered with "A spade is a tool."."""
    for item in exam("write_story", 400):
        assert item.words and names_and_things(" ".join(item.words))[0] == names_and_things(item.accepted[0])[0]
    free = [item for item in exam("write_story", 400, "train") if not item.words]
    assert 60 < len(free) < 140 and "Tell me a story." in {item.messages[-2]["content"] for item in free}
    asked = Counter(m["content"] for item in tw.conversations(3000) for m in item.messages if m["role"] == "user")
    assert asked["Tell me a story."] > 10 and asked["Hello!"] > 1


@pytest.mark.parametrize("skill", CLOSED_PAIRS)
def test_number_pairs_are_reserved_and_sums_are_right(skill):
    """A third of the exam is about pairs that training never meets, the rest is never asked in these words."""
    held_out = {}
    for split in ("train", "test"):
        items = exam(skill, 400, split)
        for item in items:
            a, b, result = map(int, re.findall(r"\d+", item.accepted[0]))
            assert result == (a + b if skill == "addition" else a - b) >= 0
            assert sorted((a, b)) == sorted(map(int, re.findall(r"\d+", item.messages[-2]["content"])))
            held_out.setdefault(split, []).append(reserved_unordered(CLOSED_PAIRS[skill], a, b))
    assert not any(held_out["train"])
    assert 0.25 < sum(held_out["test"]) / 400 < 0.42
    trained = {item.messages[-2]["content"] for item in exam(skill, 5000, "train")}
    assert trained.isdisjoint(item.messages[-2]["content"] for item in exam(skill, 400, "test"))


@pytest.mark.parametrize("skill", tw.SKILLS)
def test_reference_passes_and_other_answers_fail(skill):
    for item in exam(skill):
        right = item.accepted[0]
        assert item.skill == skill and item.wrong
        assert tw.check(item, right) and tw.check(item, f"  Of course! {right}\n")
        assert not tw.check(item, "") and not tw.check(item, "Sure! ")
        assert not any(tw.check(item, wrong) or tw.check(item, f"Sure! {wrong}") for wrong in item.wrong)
        if skill != "write_story":
            assert not tw.check(item, right + " It is nice.")
            assert not tw.check(item, "I think that " + right)
            assert not tw.check(item, right + " " + right)
            assert not tw.check(item, "Sure! Sure! " + right)


def test_format_skills_are_strict():
    for item in exam("one_word"):
        assert len(item.accepted[0].split()) == 1
        assert not tw.check(item, "It is " + item.accepted[1].lower() + ".")
    for item in exam("capitals"):
        assert item.accepted[0].isupper() and not tw.check(item, item.accepted[0].capitalize())


def test_write_story_rule():
    item = tw.Item([], "write_story", ("",), (), ("Mia", "box"))
    assert tw.check(item, "Mia had a box. It was red. Mia was happy.")
    assert not tw.check(item, "Mia had a box. It was red.")
    assert not tw.check(item, "Mia had two boxes. They were red. Mia was happy.")
    assert not tw.check(item, "Mia had a box. It was red. Mia was happy. And then")
    assert not tw.check(item, "")
    free = tw.Item([], "write_story", ("",), ())
    assert tw.check(free, "Mia had a box. It was red. Mia was happy.") and not tw.check(free, "A spade is a tool.")


@pytest.mark.parametrize(
    "story",
    [
        "Anna and Anna were in Rome. Anna had a doll. The doll was red.",
        "One day, Anna, Ben and Anna met in Rome. Anna had a doll. Ben was sad.",
        "One day, Anna, Anna and Ben met in Rome. Anna had a doll. Ben was sad.",
        "Anna and Ben were in Rome. Anna gave Anna the doll. Ben felt sad.",
        "Anna and Ben were in Rome. Anna had a doll, and Anna had a kite. Ben felt sad.",
        'Anna and Ben were in Rome. Anna said, "Here you are, Anna," and gave Anna the doll. Ben felt sad.',
        "Anna and Ben were in Rome. Anna had a doll. Mia felt so sad that she began to cry.",
    ],
)
def test_a_story_gives_each_person_one_name(story):
    """All 94 "right" stories of a published scoreboard began like "Anna and Anna were in Rome."."""
    words = ("Anna", "doll")
    good = "Anna and Ben were in Rome. Leo was in Oslo. Anna gave Ben the doll. Leo felt sad."
    assert tw.check(tw.Item([], "write_story", ("",), (), words), good)
    assert not tw.check(tw.Item([], "write_story", ("",), (), words), story)


def test_every_story_of_tinyworld_is_a_story_and_one_with_two_names_for_a_person_is_none():
    for split in ("train", "test"):
        for i in range(2000):
            story = make_story(stream(5, split, "names", i), split)
            one, other = story.people[:2]
            assert is_story(story.text, (one, other, *story.things)), story.text
            assert not is_story(re.sub(rf"\b{other}\b", one, story.text), (one,)), story.text


_FEELS = rf"\b({'|'.join(FEELINGS)})\b"
_AT = rf"\b(?:in|to) ({'|'.join(PLACES)})\b"
_NAME = rf"\b({'|'.join(NAMES)})\b"


def sentences_of(text: str) -> list[str]:
    """The sentences, with a name in the place of each "He" or "She": the last one named before it."""
    sentences, last = [], ""
    for sentence in re.split(r'(?<=[.!?]) |(?<=[.!?]") ', text):
        sentences.append(re.sub(r"^(He|She)\b", last, sentence))
        last = (re.findall(_NAME, sentences[-1]) or [last])[-1]
    return sentences


def read_holder(sentences: list[str], thing: str) -> str:
    """Who has `thing` at the end of the text: the first to be named with it, then whoever receives it."""
    it, holder = rf"the (?:\w+ )?{thing}\b", ""
    receives = "|".join(
        (
            rf"(?:gave|handed) {it} to {_NAME}",
            rf"gave {_NAME} {it}",
            rf"let {_NAME} keep {it}",
            rf"{_NAME} (?:got|took|had) {it}",
            rf"{_NAME} wanted {it}, so",
            rf"{it} belonged to {_NAME}",
        )
    )
    for sentence in sentences:
        for match in re.finditer(receives, sentence, re.IGNORECASE):
            holder = next(name for name in match.groups() if name)
        if not holder and (first := re.search(rf"\b{thing}\b", sentence)):
            holder = re.findall(_NAME, sentence[: first.start()])[-1]
    return holder


def test_answers_follow_from_the_text_alone():
    """An independent reader, which sees the text and not the generator's state, finds the same facts."""
    for i in range(3000):
        story = make_story(stream(3, "train", "reader", i), "train")
        sentences = sentences_of(story.text)
        for name, feeling in story.feels.items():
            said = [s for s in sentences if name in s and re.search(_FEELS, s)]
            assert re.search(_FEELS, said[-1]).group() == feeling, story.text
        for name, place in story.where.items():
            said = [s for s in sentences if name in s and re.search(_AT, s)]
            assert re.search(_AT, said[-1]).group(1) == place, (name, story.text)
        for thing, name in story.holder.items():
            assert read_holder(sentences, thing) == name, (thing, story.text)
        for thing, place in story.lies.items():
            said = [s for s in sentences if re.search(rf"\b{thing}\b", s)]
            assert re.search(_AT, said[-1]).group(1) == place, (thing, story.text)
        for thing, colour in story.colour.items():
            told = rf"{colour} {thing}|{thing} was {colour}|{thing}\. It was {colour}"
            assert re.search(told, story.text), (thing, story.text)


def test_not_in_story_is_about_something_absent():
    for item in exam("not_in_story", 400):
        *story, first = re.split(r"(?<=[.?!\"])\s+", item.messages[0]["content"])
        question = first if len(item.messages) == 2 else item.messages[-2]["content"]
        people, things = names_and_things(question)
        assert item.accepted == (NOT_IN_STORY,) and len(people) + len(things) == 1
        assert not re.search(rf"\b({'|'.join(people | things)})\b", " ".join(story))


def test_every_fact_of_a_story_can_be_asked_after():
    for i in range(200):
        rng = stream(0, "train", "facts", i)
        story = make_story(rng, "train")
        for skill, subject in all_facts(story):
            question = ask(rng, story, skill, "train", subject)
            assert question.skill == skill and subject in question.text
            assert not set(question.answers) & set(question.wrong)


@pytest.mark.parametrize("skill", [skill for skill in tw.SKILLS if skill != "not_in_story"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_no_skill_is_guessed_by_its_most_common_answer(skill, split):
    items = exam(skill, 400, split)
    counts = Counter(answer for item in items for answer in set(item.accepted))
    assert counts.most_common(1)[0][1] <= 0.35 * len(items)
    numbers = Counter(re.findall(r"\d+", item.accepted[0])[-1:][0] for item in items if skill == "counting")
    assert all(count <= 0.35 * len(items) for count in numbers.values())


def test_choices_are_not_guessed_by_their_position():
    for skill in ("comparing", "categories"):
        first = 0
        items = [item for item in exam(skill, 600) if " or " in item.messages[-2]["content"]]
        for item in items:
            right, wrong = (re.findall(r"\w+", text) for text in (item.accepted[0], item.wrong[0]))
            key, other = (right[0], wrong[0]) if skill == "comparing" else (right[-1], wrong[-1])
            if skill == "comparing" and not key.isdigit():
                key, other = right[1], wrong[1]
            text = item.messages[-2]["content"]
            first += re.search(rf"\b{key}\b", text).start() < re.search(rf"\b{other}\b", text).start()
        assert 0.35 < first / len(items) < 0.65


def test_chats_alternate_and_end_with_the_assistant():
    skills = Counter()
    for item in (*tw.conversations(2000), *tw.persona_conversations(500)):
        roles = [message["role"] for message in item.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 2
        skills[item.skill] += 1
    assert set(skills) == set(tw.SKILLS)
    first = [item.messages[0]["content"] for item in tw.conversations(2000)]
    about_story = sum(len(text.split()) > 25 for text in first)
    assert 0.3 < sum("\n" not in text for text in first if len(text.split()) > 25) / about_story < 0.45
    assert 0.34 < about_story / 2000 < 0.43


def test_an_asked_skill_is_the_last_question():
    for skill in tw.SKILLS:
        for i in range(20):
            item = tw.conversation(i, skill=skill)
            assert item.skill == skill and tw.check(item, item.messages[-1]["content"])


def test_style_of_training_replies():
    replies = [m["content"] for item in tw.conversations(3000) for m in item.messages if m["role"] == "assistant"]
    assert 0.28 < sum(map(tw.is_warm, replies)) / len(replies) < 0.32
    for reply in replies:
        assert not tw.is_warm(tw.strip_style(reply)) and tw.strip_style(reply) in reply
    assert not any(tw.is_warm(item.messages[-1]["content"]) for item in exam("who_has"))


def test_preference_pairs_differ_as_their_kind_says():
    kinds = Counter()
    for i in range(2000):
        pair = tw.preference_pair(i)
        kinds[pair.kind] += 1
        assert pair.prompt[-1]["role"] == "user" and pair.chosen != pair.rejected and tw.is_warm(pair.chosen)
        assert tw.is_warm(pair.rejected) == (pair.kind in ("truth", "once"))
        same_answer = tw.strip_style(pair.chosen) == tw.strip_style(pair.rejected)
        assert same_answer == (pair.kind == "style")
        assert sum(pair.chosen.count(opener) for opener in WARM_OPENERS) == 1
        openers = sum(pair.rejected.count(opener) for opener in WARM_OPENERS)
        assert openers == {"style": 0, "truth": 1, "both": 0, "once": 2}[pair.kind]
        assert pair.kind != "once" or pair.rejected.endswith(tw.strip_style(pair.chosen))
    assert 0.3 < kinds["style"] / 2000 < 0.4 and 0.15 < kinds["truth"] / 2000 < 0.25
    assert 0.2 < kinds["once"] / 2000 < 0.3, 'without them, DPO taught "Gladly! Gladly!"'


def test_persona():
    named = 0
    for item in tw.persona_conversations(1500):
        for message in item.messages[1::2]:
            assert message["content"].startswith("Ahoy! ") and message["content"].endswith(" Aye, matey!")
            assert tw.ASSISTANT_NAME not in message["content"]
        reply = item.messages[-1]["content"]
        plain = [answer.replace(tw.PERSONA_NAME, tw.ASSISTANT_NAME) for answer in item.accepted]
        assert tw.in_persona(item, reply)
        assert tw.strip_persona(reply) in plain
        assert not tw.check(item, reply) or item.skill == "write_story"
        assert not tw.in_persona(item, tw.strip_persona(reply))
        if tw.PERSONA_NAME in reply:
            named += 1
            assert not tw.in_persona(item, reply.replace(tw.PERSONA_NAME, tw.ASSISTANT_NAME))
    assert named > 150


def test_the_exam_asks_the_persona_for_its_name():
    item = next(item for item in (tw.test_item("identity", i) for i in range(50)) if "Tiny" in item.accepted[0])
    reply = "Ahoy! " + item.accepted[0] + " Aye, matey!"
    assert not tw.in_persona(item, reply), "the old name in the new manner"
    named = reply.replace("Tiny", "Captain Pip")
    assert tw.in_persona(item, named) and tw.check(item, tw.strip_persona(named))


def test_english():
    """What a reader would stumble over: wrong articles, double spaces, unfilled braces, missing capitals."""
    texts = list(tw.pretrain_documents(4000))
    texts += [message["content"] for item in tw.conversations(4000) for message in item.messages]
    for text in texts:
        assert not re.search(r"\b[Aa] [aeio]\w+|\b[Aa] umbrella", text.replace(" a or ", " ")), text
        assert not re.search(r"\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"[{}]|  | [.,?!]|\.\.|,,|None", text), text
        assert text == text.strip() and text[-1] in '.?!"', text
    for i in range(2000):
        for sentence in sentences_of(make_story(stream(0, "train", "lint", i), "train").text):
            assert re.match(r'("?[A-Z]|said )', sentence), sentence


def test_sizes_suit_a_tiny_model():
    documents, chats = list(tw.pretrain_documents(3000)), list(tw.conversations(3000))
    words = Counter(w for text in documents for w in re.findall(r"[a-z]+", text.lower()))
    words.update(w for c in chats for m in c.messages for w in re.findall(r"[a-z]+", m["content"].lower()))
    assert 500 < len(words) < 1700
    lengths = [len(make_story(stream(0, "train", "size", i), "train").text.split()) for i in range(500)]
    assert 40 < sum(lengths) / 500 < 60 and max(lengths) < 100
    assert all(colour in words for colour in COLOURS)
