"""Questions and system texts of conversations: counted in training, and selected when a picture is captioned.

A question is the text of the first user turn. Its picture comes before it; if it comes elsewhere, `<image>` marks
the place, as in `prompt.user`, so that asking the text again gives the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import PromptParameters
from qwen_vl_lora.samples.conversations import Conversation, ImagePart, Part, TextPart, ask_about
from qwen_vl_lora.samples.records import IMAGE_SLOT

MAX_LISTED = 20
"""Number of texts of each kind that a record lists, most frequent first; the others are counted."""

_SHOWN = 3
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Counted:
    """Different texts, most frequent first, and how many are not listed.

    Attributes:
        texts: each with its number of samples; 0 if unknown.
        others: number of different texts that are not in `texts`.
    """

    texts: tuple[tuple[str | None, int], ...]
    others: int = 0

    @classmethod
    def of(cls, counter: Counter[Any]) -> Self:
        return cls(tuple(counter.most_common(MAX_LISTED)), max(0, len(counter) - MAX_LISTED))

    @property
    def is_one(self) -> bool:
        return len(self) == 1

    def __len__(self) -> int:
        return len(self.texts) + self.others

    def may_hold(self, text: str | None) -> bool:
        """Whether the text is, or may be, one of these; not all are listed."""
        return self.others > 0 or any(text == listed for listed, _ in self.texts)

    def shown(self, number: int = _SHOWN) -> str:
        """Return the most frequent ones, each with its count."""
        shown = [f"{_quoted(text)}{f' ({count} samples)' if count else ''}" for text, count in self.texts[:number]]
        more = len(self) - len(shown)
        return ", ".join([*shown, *([f"{more} more"] if more else [])])


@dataclass(frozen=True)
class TrainedPrompt:
    """The first questions and the system texts of the conversations that an adapter was trained on.

    Attributes:
        questions: of conversations with a picture in their first user turn; empty if there were none.
        systems: of all conversations; None is the chat template's own.
        override: as configured; it states how the conversations were written.
    """

    questions: Counted
    systems: Counted
    override: bool

    @classmethod
    def of_conversations(cls, conversations: Iterable[Conversation], *, override: bool) -> Self:
        """Count the questions and system texts of conversations."""
        questions: Counter[str] = Counter()
        systems: Counter[str | None] = Counter()
        for conversation in conversations:
            systems[system_of(conversation)] += 1
            question = question_of(conversation)
            if question is not None:
                questions[question] += 1
        return cls(Counted.of(questions), Counted.of(systems), override)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Read the result of `to_record`; records of older versions state one question and one system text.

        Raises:
            KeyError, TypeError, ValueError: if the record has another form.
        """
        questions, systems = record.get("questions"), record.get("systems")
        return cls(
            _one(record["user"]) if questions is None else _listed(questions, record["other_questions"]),
            _one(record["system"]) if systems is None else _listed(systems, record["other_systems"]),
            bool(record["override"]),
        )

    def to_record(self) -> dict[str, Any]:
        """Return the block `prompt` of an adapter record: `user` and `system` if unique, else lists with counts."""
        record: dict[str, Any] = {
            "user": self.questions.texts[0][0] if self.questions.is_one else None,
            "system": self.systems.texts[0][0] if self.systems.is_one else None,
            "override": self.override,
        }
        for name, counted in (("questions", self.questions), ("systems", self.systems)):
            if not counted.is_one:
                record[name] = [{"text": text, "samples": count} for text, count in counted.texts]
                record[f"other_{name}"] = counted.others
        return record

    def sentence(self) -> str:
        """Return one line that states what is trained."""
        if not self.questions:
            asked = "No conversation shows a picture in its first question"
        elif self.questions.is_one:
            asked = f"All pictures are asked: {self.questions.shown()}"
        else:
            asked = f"The pictures are asked {len(self.questions)} different questions: {self.questions.shown()}"
        if self.systems.is_one:
            return f"{asked}; system text: {_quoted(self.systems.texts[0][0])}."
        return f"{asked}; {len(self.systems)} different system texts: {self.systems.shown()}."

    def choose(self, user: str | None = None, system: str | None = None) -> PromptParameters | None:
        """Return the trained prompt, or the given texts; None if several were trained and none is given.

        Args:
            user: a question; None takes the trained one.
            system: a system text; None takes the trained one, the empty text is the chat template's own.

        Raises:
            ParameterError: if a given text is not valid.
        """
        if (user is None and not self.questions.is_one) or (system is None and not self.systems.is_one):
            return None
        return checked_prompt(
            self.questions.texts[0][0] if user is None else user,
            self.systems.texts[0][0] if system is None else system or None,
            override=self.override,
        )

    def refusal(self) -> str:
        """Explain why `choose` returned None, and name the options that give a text."""
        faults, options, parameters = [], [], []
        if not self.questions.is_one:
            faults.append(
                f"with {len(self.questions)} different questions: {self.questions.shown()}"
                if self.questions
                else "without a picture in a first question"
            )
            options.append('--prompt "…"')
            parameters.append("prompt.user=…")
        if not self.systems.is_one:
            faults.append(f"with {len(self.systems)} different system texts: {self.systems.shown()}")
            options.append('--system "…" (empty: the chat template\'s own)')
            parameters.append("prompt.system=…")
        return (
            f"The adapter was trained {' and '.join(faults)}. Choose one: "
            f"`qwen-vl-lora caption` takes {' and '.join(options)}; the inference pipeline takes "
            f'--params "inference.settings_from=parameters,{",".join(parameters)}".'
        )

    def differences(self, prompt: PromptParameters) -> list[str]:
        """Return the parts of a configured prompt that were not trained."""
        asked = ask_about("picture", prompt)
        found = []
        if self.questions and not self.questions.may_hold(question_of(asked)):
            found.append(f"prompt: trained with {self.questions.shown()}, configured {_quoted(prompt.user)}")
        if not self.systems.may_hold(prompt.system):
            found.append(
                f"prompt: trained with system text {self.systems.shown()}, configured {_quoted(prompt.system)}"
            )
        return found

    def untrained(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Return conversations with a question about a picture that was not trained, as far as known."""
        return [
            conversation
            for conversation in conversations
            if (question := question_of(conversation)) is not None
            and not (self.questions.may_hold(question) and self.systems.may_hold(system_of(conversation)))
        ]


def checked_prompt(user: str | None, system: str | None, *, override: bool) -> PromptParameters:
    """Build a prompt from texts of a record or a command line.

    Raises:
        ParameterError: if a text is not valid, such as an empty one.
    """
    try:
        return PromptParameters.model_validate({"user": user, "system": system, "override": override})
    except ValidationError as error:
        text = error.errors()[0]["input"]
        raise ParameterError(
            f"The prompt {text!r} is not valid: {error.errors()[0]['msg']}. Give a text or omit the option."
        ) from error


def question_of(conversation: Conversation) -> str | None:
    """Return the first user turn in the form of `prompt.user`; None if it has no picture."""
    parts = next(parts for role, parts in conversation.turns if role == "user")
    if not any(isinstance(part, ImagePart) for part in parts):
        return None
    match parts:
        case (ImagePart(), TextPart(text)):
            return text
    return "".join(_slot_or_text(part) for part in parts)


def system_of(conversation: Conversation) -> str | None:
    """Return the system text; None for the chat template's own."""
    for role, parts in conversation.turns:
        if role == "system":
            return "".join(_slot_or_text(part) for part in parts)
    return None


def _slot_or_text(part: Part) -> str:
    return part.text if isinstance(part, TextPart) else IMAGE_SLOT


def _one(text: Any) -> Counted:
    if not isinstance(text, str | None):
        raise TypeError(f"expected a text; got {type(text).__name__}")
    return Counted(((text, 0),))


def _listed(entries: Any, others: Any) -> Counted:
    texts = tuple((entry["text"], int(entry["samples"])) for entry in entries)
    if not all(isinstance(text, str | None) for text, _ in texts):
        raise TypeError("questions and system texts must be texts")
    return Counted(texts, int(others))


def _quoted(text: str | None) -> str:
    if text is None:
        return "the chat template's own"
    return repr(text) if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]!r}…"
