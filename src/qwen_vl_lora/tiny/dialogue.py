"""The questions and chatty answers that the tiny base is pre-trained on.

Each topic makes one question and its answer from a scene, with several phrasings of
both. The answers use the words of the short captions in other forms, so that LoRA can
learn the other style from few pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from qwen_vl_lora.tiny.drawing import BACKGROUNDS, COLOURS, GRID, SHAPES, SIZES, Scene, Thing
from qwen_vl_lora.tiny.language import PLACES, enumerate_words, name, place, relation
from qwen_vl_lora.tiny.partitions import Partition, draw_scenes

DESCRIBE_PROMPT = "Describe this picture."
"""The prompt of the default recipe."""

_DESCRIBE_PROMPTS = (
    DESCRIBE_PROMPT,
    "Describe the image.",
    "Please describe this picture in detail.",
    "Caption this picture.",
    "What is in this picture?",
    "What does the image show?",
    "Tell me about this picture.",
    "Write a caption.",
    # The tutorials' prompts, so that the base answers them too.
    "COCO Yes:",
    "请描述这张图片的内容。",
    "",
)

_NUMBERS = {2: "two objects", 3: "three objects", 4: "four objects"}

_SMALL_TALK = (
    ("Hello!", "Hello! Show me a picture and I will describe it."),
    ("Who are you?", "I am a small model that describes pictures of shapes."),
    ("What can you do?", "I can describe a picture and answer questions about its shapes and colours."),
    ("Which colours do you know?", f"I know {enumerate_words(tuple(COLOURS))}."),
    ("Which shapes do you know?", f"I know {enumerate_words(SHAPES)}."),
    ("Which backgrounds do you know?", f"I know {enumerate_words(tuple(BACKGROUNDS))}."),
    ("Which sizes do you know?", f"I know {enumerate_words(SIZES)}."),
    ("Thank you!", "You are welcome."),
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user turn and its answer.

    Attributes:
        pictures: scenes of the pictures in the user turn.
        pictures_first: whether they come before the question's text or after it.
    """

    question: str
    answer: str
    pictures: tuple[Scene, ...] = ()
    pictures_first: bool = True


Conversation = tuple[Exchange, ...]
Topic = Callable[[Scene, random.Random], tuple[str, str]]


def random_conversation(rng: random.Random, num_objects: int | None = None) -> Conversation:
    """Draw a conversation about fresh scenes of the pre-training partition.

    More than half are one full description, which names every attribute. The rest train
    single questions, several turns, two pictures and text without pictures.
    """
    scenes = draw_scenes(Partition.PRETRAINING, rng, num_objects)
    kind = rng.random()
    if kind < 0.58:
        return _converse(next(scenes), [describe], rng)
    if kind < 0.66:
        return _converse(next(scenes), [list_things], rng)
    if kind < 0.70:
        return _converse(next(scenes), [describe, rng.choice(_QUESTIONS)], rng)
    if kind < 0.94:
        return _converse(next(scenes), rng.sample(_QUESTIONS, 3), rng)
    if kind < 0.97:
        return _compare(next(scenes), next(scenes), rng)
    return (Exchange(*rng.choice(_SMALL_TALK)),)


def describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask for a description; the default prompt is the most frequent one."""
    prompt = DESCRIBE_PROMPT if rng.random() < 0.5 else rng.choice(_DESCRIBE_PROMPTS)
    return prompt, long_description(scene, form=rng.choices(range(3), (60, 20, 20))[0])


def long_description(scene: Scene, form: int) -> str:
    """Return one of three chatty descriptions: about thirty words for two objects, fifty for four."""
    ground, count = scene.background, _NUMBERS[len(scene.objects)]
    if form == 0:
        things = [f"{_capitalised(place(o))} there is a {name(o.thing)}." for o in scene.objects]
        return " ".join([f"This picture shows {count} on a {ground} background.", *things])
    if form == 1:
        things = [f"There is a {name(o.thing)} {place(o)}." for o in scene.objects]
        return " ".join([f"The background of this picture is {ground}.", *things])
    things = [f"A {name(o.thing)} is {place(o)}." for o in scene.objects]
    return " ".join([f"In this picture I can see {count}.", *things, f"The background is {ground}."])


def list_things(scene: Scene, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(("List the objects.", "What do you see?", "Which objects are there?"))
    things = enumerate_words([f"a {name(thing)}" for thing in scene.things])
    return question, f"I see {things} on a {scene.background} background."


def count_things(scene: Scene, rng: random.Random) -> tuple[str, str]:
    count = _NUMBERS[len(scene.objects)]
    question = rng.choice(("How many objects are there?", "How many shapes do you see?"))
    return _ask(question, f"I see {count} in this picture.", count, rng)


def tell_background(scene: Scene, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(("Which colour is the background?", "What is the background?"))
    return _ask(question, f"The background is {scene.background}.", scene.background, rng)


def tell_what(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask what is in a place: in half the cases in any place, which is often empty."""
    cell = rng.randrange(GRID), rng.randrange(GRID)
    where = place(rng.choice(scene.objects)) if rng.random() < 0.5 else PLACES[cell[0]][cell[1]]
    found = [name(placed.thing) for placed in scene.objects if place(placed) == where]
    if not found:
        return _ask(f"What is {where}?", f"There is nothing {where}.", "nothing", rng)
    sentence = f"{_capitalised(where)} there is {enumerate_words([f'a {thing}' for thing in found])}."
    return _ask(f"What is {where}?", sentence, enumerate_words(found), rng)


def tell_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    target = rng.choice(scene.objects)
    kind = _kind(target.thing)
    return _ask(f"Where is the {kind}?", f"The {kind} is {place(target)}.", place(target), rng)


def tell_attribute(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask for an attribute of an object that is alone in its place; ask for a place if there is none."""
    places = [place(placed) for placed in scene.objects]
    alone = [placed for placed in scene.objects if places.count(place(placed)) == 1]
    if not alone:
        return tell_where(scene, rng)
    target = rng.choice(alone)
    question, word = rng.choice(
        (
            ("Which colour is", target.thing.colour),
            ("Which shape is", target.thing.shape),
            ("How big is", target.thing.size),
        )
    )
    where = place(target)
    article = "a " if word in SHAPES else ""
    return _ask(f"{question} the object {where}?", f"The object {where} is {article}{word}.", word, rng)


def tell_relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(scene.objects, 2)
    question = f"How does the {_kind(first.thing)} lie to the {_kind(second.thing)}?"
    words = relation(first, second)
    brief = f"{name(first.thing)} {words} {name(second.thing)}"
    return _ask(question, f"The {name(first.thing)} is {words} the {name(second.thing)}.", brief, rng)


def tell_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        target = rng.choice(scene.objects)
        thing = name(target.thing)
        return f"Is there a {thing}?", f"Yes, there is a {thing} {place(target)}."
    thing = name(_absent_thing(scene, rng))
    return f"Is there a {thing}?", f"No, there is no {thing} in this picture."


_QUESTIONS: tuple[Topic, ...] = (
    count_things,
    tell_background,
    tell_what,
    tell_where,
    tell_attribute,
    tell_relation,
    tell_presence,
)


def _converse(scene: Scene, topics: list[Topic], rng: random.Random) -> Conversation:
    """A conversation about one picture, which is in the first question, mostly before its text."""
    first, *others = [topic(scene, rng) for topic in topics]
    opening = Exchange(*first, pictures=(scene,), pictures_first=rng.random() < 0.9)
    return opening, *(Exchange(*other) for other in others)


def _compare(first: Scene, second: Scene, rng: random.Random) -> Conversation:
    """Ask about one of two pictures."""
    ordinal, scene = rng.choice((("first", first), ("second", second)))
    if rng.random() < 0.5:
        question = f"Which colour is the background of the {ordinal} picture?"
        answer = f"The background of the {ordinal} picture is {scene.background}."
    else:
        question = f"List the objects of the {ordinal} picture."
        answer = f"I see {enumerate_words([f'a {name(thing)}' for thing in scene.things])}."
    return (Exchange(question, answer, pictures=(first, second)),)


def _ask(question: str, sentence: str, brief: str, rng: random.Random) -> tuple[str, str]:
    """Ask for a sentence or, in a third of the cases, for the bare words."""
    if rng.random() < 1 / 3:
        return f"{question} Answer briefly.", brief
    return question, sentence


def _kind(thing: Thing) -> str:
    """Colour and shape, which no two objects of a scene share."""
    return f"{thing.colour} {thing.shape}"


def _absent_thing(scene: Scene, rng: random.Random) -> Thing:
    while True:
        thing = Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
        if thing not in scene.things:
            return thing


def _capitalised(words: str) -> str:
    return words[0].upper() + words[1:]
