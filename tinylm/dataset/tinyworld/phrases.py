"""The wordings of TinyWorld's questions that need no story."""

from __future__ import annotations

ADDITION = (
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Can you add {a} and {b}?",
    "Tell me the sum of {a} and {b}.",
)
SUBTRACTION = (
    "What is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "Take {b} away from {a}.",
    "Can you take {b} away from {a}?",
    "Tell me what {a} minus {b} is.",
)
COUNT_WORDS = (
    "How many times does the word {word} come in this list: {words}?",
    "Count the word {word} in this list: {words}.",
    "How often can you find the word {word} here: {words}?",
    "Here is a list: {words}. How many times is the word {word} in it?",
)
COUNT_LETTERS = (
    "How many letters are in the word {word}?",
    "How many letters does the word {word} have?",
    "Count the letters in the word {word}.",
    "Tell me how many letters the word {word} has.",
)
COMPARE_NUMBERS = {
    "bigger": (
        "Which is bigger, {a} or {b}?",
        "Which number is bigger: {a} or {b}?",
        "Tell me the bigger number: {a} or {b}.",
        "Of {a} and {b}, which is bigger?",
    ),
    "smaller": (
        "Which is smaller, {a} or {b}?",
        "Which number is smaller: {a} or {b}?",
        "Tell me the smaller number: {a} or {b}.",
        "Of {a} and {b}, which is smaller?",
    ),
}
COMPARE_WEIGHTS = (
    "Which is {more}, {a} or {b}?",
    "What is {more}: {a} or {b}?",
    "Tell me which is {more}, {a} or {b}.",
    "Think of {a} and {b}. Which is {more}?",
)
SORT_NUMBERS = (
    "Sort these numbers: {items}.",
    "Put these numbers in order: {items}.",
    "Please sort {items} from small to big.",
    "Can you put these numbers in order: {items}?",
)
SORT_WORDS = (
    "Sort these words by their first letter: {items}.",
    "Put these words in the order of the alphabet: {items}.",
    "Please sort the words {items} from a to z.",
    "Can you put these words in the order of the alphabet: {items}?",
)
REVERSE = (
    "Say these words backwards: {items}.",
    "Reverse this list: {items}.",
    "Can you turn this list around: {items}?",
    "Say the list {items} from the end to the start.",
)
SPELL = (
    "How do you spell {word}?",
    "Spell the word {word}.",
    "Can you spell {word}?",
    "Please spell {word} for me.",
    "Which letters are in {word}?",
)
OPPOSITE = (
    "What is the opposite of {word}?",
    "Tell me the opposite of {word}.",
    "Which word is the opposite of {word}?",
    "Do you know the opposite of {word}?",
    "Give me the opposite of {word}.",
    "Can you name the opposite of {word}?",
)
CATEGORY = (
    "What is {a_word}?",
    "What kind of thing is {a_word}?",
    "Is {a_word} {one} or {other}?",
    "Tell me what {a_word} is.",
    "Do you know what {a_word} is?",
    "Which is right: is {a_word} {one} or {other}?",
)
HELLO = (
    "Hello, I am {name}.",
    "Hi! My name is {name}.",
    "Good morning! I am {name}.",
    "Hello there, my name is {name}.",
    "Hi, {name} here.",
    "Hello! You can call me {name}.",
    "Good evening, I am {name}.",
    "Nice to meet you! I am {name}.",
)
# By what they ask for: who, the name, what kind of thing, what it is good at.
IDENTITY = (
    ("Who are you?", "Tell me who you are.", "Who am I talking to?", "Who is there?"),
    ("What is your name?", "Do you have a name?", "Tell me your name.", "What should I call you?"),
    ("What are you?", "Are you a person?", "Are you a robot?", "Tell me what you are."),
    ("What can you do?", "How can you help me?", "What are you good at?", "Tell me what you can do."),
)
LEAD_INS = (
    "",
    "Hello! ",
    "Hi! ",
    "Good morning! ",
    "Excuse me. ",
    "I have a question. ",
    "One thing, please. ",
    "Let us talk. ",
)
CAPITALS = (
    "Write {word} in capital letters.",
    "Answer in capital letters. Say the word {word}.",
    "Say {word} in capital letters.",
    "Put the word {word} in capital letters.",
    "Can you write {word} in capital letters?",
    "Answer in capital letters. Repeat after me: {word}.",
)
