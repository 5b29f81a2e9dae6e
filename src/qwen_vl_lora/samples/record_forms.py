"""Forms of one JSON record, read into samples.

    tutorials   {"id", "conversations": [{"from": "user", "value": "Text <|vision_start|>PATH<|vision_end|>"}, …]}
                {"id", "conversations": [{"role": "user", "value": PATH}, …]}
    LLaVA       {"id", "image": PATH, "conversations": [{"from": "human", "value": "<image>\\nText"}, …]}
    ms-swift    {"images": [PATH, …], "messages": [{"role": "user", "content": "<image>Text"}, …]}
                {"images": [PATH, …], "query": "<image>Text", "response": …, "history": [[query, response], …]}
                {"images": [PATH, …], "conversation": [{"human": "<image>Text", "assistant": …}, …]}
    FineVision  {"images": [PATH, …], "texts": [{"user": "Text", "assistant": …}, …]}
    OpenAI      {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PATH}}, …]}, …]}
    Alpaca      {"images": [PATH, …], "instruction": "<image>Text", "input": …, "output": …}
    TRL         {"images": [PATH, …], "prompt": text or messages, "completion": text or messages}
    VQA         {"image": PATH, "question": …, "answer": …}
    Label Studio  {"data": {"image": PATH}, "annotations": [{"result": [{"type": "textarea", …}]}]}
    caption     {"image_path": PATH, "caption": …}, by all the names of `fields`

Each may have a `system` text beside its turns. An assistant turn alone, with a picture beside it, is a
caption. Pictures without a place in the turns come before the first question.

A key is read, or it rejects the row because its meaning is known and not supported, or it is reported as ignored.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_vl_lora.samples.conversations import MARKER_END, MARKER_START
from qwen_vl_lora.samples.fields import (
    ADDRESS_NAMES,
    ID_NAMES,
    IMAGE_NAMES,
    UNUSABLE_FLAGS,
    USABLE_FLAGS,
    Fields,
    find_fields,
    plain_name,
)
from qwen_vl_lora.samples.meanings import (
    PREFERENCE_FLAGS,
    SCORE_FLAGS,
    UNSUPPORTED,
    Unread,
    check_content,
    check_record,
    check_turn,
    is_empty,
    is_missing,
    is_scored,
    is_true,
)
from qwen_vl_lora.samples.record_files import TooDeep
from qwen_vl_lora.samples.records import (
    IMAGE_SLOT,
    Reference,
    Rejection,
    Role,
    Row,
    RowError,
    SourceSample,
    Turn,
)
from qwen_vl_lora.samples.references import Place, id_from_reference, shown, unread_keys
from qwen_vl_lora.samples.source import AS_USUAL, Reading
from qwen_vl_lora.samples.texts import printable
from qwen_vl_lora.samples.values import captions_of, id_of, malformed, split_of

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}

_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")

MARKED = re.compile(f"{re.escape(MARKER_START)}(.*?){re.escape(MARKER_END)}|<img>(.*?)</img>", re.DOTALL)
"""A path in a text, between the markers of the tutorials or the older ones of Qwen-VL."""

_PLACE = re.compile(f"{MARKED.pattern}|{re.escape(IMAGE_SLOT)}", re.DOTALL)
"""Place of a picture: a marker around its path, or a slot for the next picture of the record."""

_BARE_PATH = re.compile(r"(\S+|/.*)\.(jpe?g|png|webp|bmp|gif)", re.IGNORECASE)
"""A user turn that is only a path. A relative path may not contain blanks, because it could be a question."""

_QWEN_PAD = "<|image_pad|>"

_TURN_NAMES = (("from", "value"), ("role", "content"), ("role", "value"), ("from", "content"), ("role", "text"))
_PAIR_NAMES = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"))
_BESIDE = (
    "images",
    "image",
    "image_path",
    *(name for name in IMAGE_NAMES if name not in ("image", "images")),
    *ADDRESS_NAMES,
)
"""Keys that hold the pictures of a chat, in order of precedence."""

_OF_LABEL_STUDIO = ("data", "annotations", "completions", "predictions", "drafts", "meta")
"""Keys of Label Studio's tasks that hold the captions, or nothing that annotators wrote."""

_LIST_KEYS = ("messages", "conversations", "conversation", "texts")
_PAIR_KEYS = (("query", "response"), ("instruction", "output"), ("prompt", "completion"), ("question", "answer"))

Message = tuple[Any, Any, bool]
"""Role, content, and whether the answer is scored (trained)."""


@dataclass(frozen=True)
class RecordReader:
    """Reads records of one source."""

    place: Place
    reading: Reading = AS_USUAL
    holds: tuple[str, ...] = ()
    """Keys whose values are pictures."""

    def read(self, record: Any, row: int) -> list[SourceSample]:
        """Return the samples of a record: one, or one for each of its captions.

        A record without an id gets one from the path of its first picture, or from its row number.

        Raises:
            RowError: when the record has none of the forms, or contains something that is not supported.
            DataFormatError: when two of its keys are ambiguous.
        """
        if not isinstance(record, dict):
            raise malformed(f"A record must be a JSON object; got {shown(record)}.")
        for rewrite in REWRITES:
            record = rewrite(record) or record
        form = None if self.reading.names_caption else _form_of(record)
        unread: Unread = {}
        check_record(record, form is not None, unread)
        if form is None:
            return self._read_captions(record, row, unread)
        return [self._read_chat(record, row, form, unread)]

    def _read_captions(self, record: dict[str, Any], row: int, unread: Unread) -> list[SourceSample]:
        fields = _fields_of(_names_of(record), self.reading, self.holds)
        if fields.image is None or not fields.captions:
            raise RowError(
                "missing_key",
                "A record needs a picture and a caption (`image_path` and `caption`), or turns (`messages`, "
                f"`conversations`, `query` and `response`); it has {shown(sorted(map(str, record)))}.",
            )
        system = _system_of(record)
        given = record[fields.image]
        if isinstance(given, list):
            if len(given) != 1:
                raise RowError("placeholder_mismatch", f"A caption describes one picture; the row has {len(given)}.")
            given = given[0]
        image = self.place.resolve(given)
        own = id_of(record.get(fields.id)) if fields.id else ""
        image_id = own or id_from_reference(given, self.place.folder) or f"row_{row}"
        split = split_of(record.get(fields.split)) if fields.split else None
        unread.update((name, None) for name in fields.ignored if name != "system")
        unread.update((f"{key} (of a picture)", None) for key in unread_keys(given))
        texts = captions_of([record[name] for name in fields.captions], unread)
        return [
            SourceSample(
                row,
                image_id,
                (image,),
                (*system, Turn("assistant", text)),
                bool(own),
                "caption",
                split,
                ignored=tuple(unread),
            )
            for text in texts
        ]

    def _read_chat(self, record: dict[str, Any], row: int, form: str, unread: Unread) -> SourceSample:
        unread.update((name, None) for name in _unread_keys(tuple(map(str, record)), form, self.reading.split_column))
        beside = _named_images(record, unread)
        named = iter(beside)
        references: list[Any] = []
        messages = _messages(record, form, unread)
        turns = tuple(_read_turn(message, named, references, unread) for message in messages)
        turns = (*_system_of(record), *turns)
        if not beside and not references:
            turns = _read_bare_path(turns, references)
        unplaced = list(named)
        if unplaced:
            turns = _place_first(turns, len(unplaced))
            references.extend(unplaced)
        unread.update((f"{key} (of a picture)", None) for given in references for key in unread_keys(given))
        images: tuple[Reference, ...] = tuple(map(self.place.resolve, references))
        own = id_of(record.get("id"))
        image_id = own or (id_from_reference(references[0], self.place.folder) if len(references) == 1 else "")
        split = split_of(record.get(self.reading.split_column)) if self.reading.split_column else None
        return SourceSample(
            row,
            image_id or f"row_{row}",
            images,
            turns,
            bool(own),
            form,
            split,
            ignored=tuple(unread),
        )


def read_or_reject(reader: RecordReader, record: Any, row: int, name: str = "") -> Iterator[Row]:
    """Yield the samples of a record, or its rejection.

    Args:
        name: name for a record without a path of its own, such as a member of an archive.
    """
    if isinstance(record, TooDeep):
        yield Rejection(row, printable(name), "malformed_row", record.reason)
        return
    try:
        samples = reader.read(record, row)
    except RowError as fault:
        own = record.get("id", record.get("image_id", name)) if isinstance(record, dict) else name
        yield Rejection(row, printable(str(own)), fault.reason, fault.detail)
        return
    for sample in samples:
        yield sample if sample.id_is_given or not name else replace(sample, id=name)


def _of_label_studio(task: dict[str, Any]) -> dict[str, Any] | None:
    """Return the picture of a Label Studio task and the texts of annotators; all other keys get longer names."""
    data = task.get("data")
    if not isinstance(data, dict) or not ("annotations" in task or "completions" in task):
        return None
    key = next((key for key in ("image", "img", "picture", "url") if isinstance(data.get(key), str)), None)
    record: dict[str, Any] = {"image_path": data.get(key), "captions": []}
    if "id" in task:
        record["image_id"] = task["id"]
    for annotation in task.get("annotations") or task.get("completions") or []:
        if not isinstance(annotation, dict) or is_true(annotation.get("was_cancelled")):
            continue
        for result in annotation.get("result") or []:
            value = result.get("value") if isinstance(result, dict) else None
            if isinstance(value, dict) and result.get("type") == "textarea":
                text = value.get("text")
                record["captions"].extend(text if isinstance(text, list) else [text])
            elif isinstance(result, dict):
                record[f"{result.get('type')} (of a result)"] = True
    record |= {f"{name} (of the data)": value for name, value in data.items() if name != key}
    return record | {
        f"{name} (of a task)": value for name, value in task.items() if name not in (*_OF_LABEL_STUDIO, "id")
    }


REWRITES: tuple[Callable[[dict[str, Any]], dict[str, Any] | None], ...] = (_of_label_studio,)
"""Forms that are read as another one: each function returns the record in a form above, or None for other forms."""


def _form_of(record: dict[str, Any]) -> str | None:
    """Return the key that holds the turns; None for a caption."""
    for key in _LIST_KEYS:
        if record.get(key) is not None:
            return key
    for question, answer in _PAIR_KEYS:
        if question in record and answer in record:
            return question
    return None


def _names_of(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys of a record without empty picture keys such as `images: []` beside a filled one."""
    empty = [key for key, value in record.items() if (is_missing(value) or value == []) and plain_name(key) in _BESIDE]
    if empty and any(plain_name(key) in _BESIDE and key not in empty for key in record):
        return tuple(str(key) for key in record if key not in empty)
    return tuple(map(str, record))


@functools.lru_cache(maxsize=1024)
def _fields_of(names: tuple[str, ...], reading: Reading, holds: tuple[str, ...]) -> Fields:
    return find_fields(names, reading, ids=(*ID_NAMES, "id"), holds=holds)


@functools.lru_cache(maxsize=1024)
def _unread_keys(names: tuple[str, ...], form: str, split: str | None) -> tuple[str, ...]:
    """Return the keys of a chat that are not read."""
    pairs = dict(_PAIR_KEYS)
    read = {form, pairs.get(form), split, "id", "system"}
    read |= {"history"} if form in pairs else set()
    read |= {"input"} if form == "instruction" else set()
    known = {"image_path", *IMAGE_NAMES, *ADDRESS_NAMES, *UNSUPPORTED, *PREFERENCE_FLAGS, *SCORE_FLAGS}
    known |= {*UNUSABLE_FLAGS, *USABLE_FLAGS}
    return tuple(name for name in names if name not in read and plain_name(name) not in known)


def _system_of(record: dict[str, Any]) -> tuple[Turn, ...]:
    system = record.get("system")
    if system is not None and system == system and not isinstance(system, str):
        raise malformed(f"`system` must be text; got {shown(system)}.")
    return (Turn("system", system),) if isinstance(system, str) and system.strip() else ()


def _messages(record: dict[str, Any], form: str, unread: Unread) -> list[Message]:
    """Return role, content and score of every turn, under the names of any form."""
    if form in _LIST_KEYS:
        turns = _transposed(record[form])
        if not isinstance(turns, list) or not turns:
            raise malformed(f"`{form}` must be a list of turns; got {shown(turns)}.")
        return [message for turn in turns for message in _messages_of_turn(form, turn, unread)]
    answer = dict(_PAIR_KEYS)[form]
    asked, answered = record[form], record[answer]
    given = record.get("input") if form == "instruction" else None
    if not is_empty(given):
        if not isinstance(given, str) or not isinstance(asked, str):
            raise malformed(f"`input` must be a text that follows the instruction; got {shown(given)}.")
        asked = f"{asked}\n{given}" if given.strip() else asked
    if isinstance(asked, list) or isinstance(answered, list):
        if not is_empty(record.get("history")):
            raise malformed("A record cannot have `history` beside lists of turns; write all turns into one list.")
        return [*_turns_of(form, asked, "user", unread), *_turns_of(answer, answered, "assistant", unread)]
    return [*_history(record), ("user", asked, True), ("assistant", answered, True)]


def _transposed(turns: Any) -> Any:
    """Return turns from the form in which the `datasets` library stores a sequence: a list for each key."""
    if not (isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values())):
        return turns
    if len({len(column) for column in turns.values()}) > 1:
        return turns
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


def _turns_of(key: str, value: Any, role: Role, unread: Unread) -> list[Message]:
    """Return one side of a prompt and its completion: a text, or messages."""
    if not isinstance(value, list):
        return [(role, value, True)]
    return [message for turn in value for message in _messages_of_turn(key, turn, unread)]


def _messages_of_turn(key: str, turn: Any, unread: Unread) -> list[Message]:
    """Return one turn, or the two turns that ms-swift's ShareGPT form keeps together."""
    names = set(turn) if isinstance(turn, dict) else set()
    for user, assistant in _PAIR_NAMES:
        if {user, assistant} <= names:
            check_turn(turn, (user, assistant), unread)
            return [("user", turn[user], True), ("assistant", turn[assistant], is_scored(turn, is_answer=True))]
    for role, content in _TURN_NAMES:
        if {role, content} <= names:
            check_turn(turn, (role, content), unread)
            is_answer = _ROLES.get(str(turn[role]).lower()) == "assistant"
            return [(turn[role], turn[content], is_scored(turn, is_answer))]
    raise RowError(
        "missing_key", f"A turn of `{key}` needs `role` and `content`, or `from` and `value`; got {shown(turn)}."
    )


def _history(record: dict[str, Any]) -> list[Message]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise malformed(f"`history` must be a list of pairs of query and response; got {shown(history)}.")
    return [turn for query, response in history for turn in (("user", query, True), ("assistant", response, True))]


def _read_bare_path(turns: Sequence[Turn], references: list[Any]) -> tuple[Turn, ...]:
    """Replace a first question that is only a path with that picture."""
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or not _BARE_PATH.fullmatch(turns[first].text.strip()):
        return tuple(turns)
    references.append(turns[first].text)
    return (*turns[:first], Turn("user", IMAGE_SLOT), *turns[first + 1 :])


def _place_first(turns: Sequence[Turn], num_images: int) -> tuple[Turn, ...]:
    """Add slots before the first question; turns with slots of their own, or without a question, are unchanged."""
    questions = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not questions or any(IMAGE_SLOT in turns[place].text for place in questions):
        return tuple(turns)  # the numbers of slots and pictures are compared with the turns
    first = questions[0]
    return (*turns[:first], Turn("user", IMAGE_SLOT * num_images + turns[first].text), *turns[first + 1 :])


def _named_images(record: dict[str, Any], unread: Unread) -> list[Any]:
    """Return the pictures beside the turns, from the first key that has any; other keys are added to `unread`.

    Raises:
        RowError: `malformed_row` when two of the project's own keys name different pictures.
    """
    held: dict[str, list[Any]] = {}
    for key, value in record.items():
        name = plain_name(key)
        if name in _BESIDE and not is_missing(value) and value not in ("", []):
            held[key] = value if isinstance(value, list) else [value]
    if not held:  # an empty key rejects the row: a question about a picture is not trained without the picture
        return [""] if any(value == "" and plain_name(key) in _BESIDE[:3] for key, value in record.items()) else []
    first, *others = sorted(held, key=lambda key: _BESIDE.index(plain_name(key)))
    for other in others:
        if held[other] == held[first]:
            continue
        if plain_name(other) in _BESIDE[:3]:
            raise malformed(f"`{first}` and `{other}` name different pictures; write them under one key.")
        unread[other] = None
    return held[first]


def _read_turn(message: Message, named: Iterator[Any], references: list[Any], unread: Unread) -> Turn:
    """Build one turn; its pictures are appended to `references`, in order."""
    name, content, scored = message
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None and isinstance(name, str) and name.lower() in _TOOL_ROLES:
        raise RowError("unsupported_content", f"The record has a {name} turn: tool calls are not trained.")
    if role is None:
        raise RowError("wrong_roles", f"The role {shown(name)} is not one of {', '.join(_ROLES)}.")
    if content is None or content != content:  # only NaN differs from itself
        raise RowError("empty_caption", f"The {role} turn is {content}.")
    if isinstance(content, list):
        text = "".join(_read_item(item, role, named, references, unread) for item in content)
    elif isinstance(content, str):
        text = _read_text(content, role, named, references)
    else:
        raise malformed(f"The {role} turn must be text or a list of contents; got {shown(content)}.")
    return Turn(role, text, scored if role == "assistant" else True)


def _read_item(item: Any, role: Role, named: Iterator[Any], references: list[Any], unread: Unread) -> str:
    """Return one content of an OpenAI turn: text, or a picture with its own path or the next of the record."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(item.get("text"), str):
        check_content(item, ("type", "text"), unread)
        return _read_text(item["text"], role, named, references)
    if kind in ("image", "image_url", "input_image") and role == "user":
        keys = (kind, "image_url", "image", "source", "url", "path", "file_name", "base64", "data")
        found = next((key for key in keys if item.get(key) is not None), None)
        check_content(item, ("type", found or ""), unread)
        references.extend([item[found]] if found is not None else _next_of(named))
        return IMAGE_SLOT
    if kind is not None and kind not in ("text", "image", "image_url", "input_image", "output_text", "input_text"):
        raise RowError("unsupported_content", f"A {role} turn has {kind!r} content; only text and images are read.")
    raise malformed(
        f"A {role} turn cannot contain {shown(item)}; allowed are text and, in user turns, image and image_url."
    )


def _read_text(text: str, role: Role, named: Iterator[Any], references: list[Any]) -> str:
    if role != "user" or "<" not in text:
        return text

    def to_slot(place: re.Match[str]) -> str:
        path = place.group(1) if place.group(1) is not None else place.group(2)
        references.extend(_next_of(named) if path is None or path.strip() == _QWEN_PAD else [path])
        return IMAGE_SLOT

    return _PLACE.sub(to_slot, text)


def _next_of(named: Iterator[Any]) -> list[Any]:
    """Return the next picture of the record; none if all are used, which the comparison of numbers reports."""
    image = next(named, None)
    return [] if image is None else [image]
