"""Captions that were written before, kept in the workspace.

A caption is a function of its question and of everything in its key, so the base's captions are made once, and a
killed evaluation or inference resumes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen_vl_lora.evaluation.generation import Caption
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.runs.storage import make_folder, write_whole
from qwen_vl_lora.samples.conversations import Conversation, ImagePart, Part
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)

FOLDER = "evaluation"
"""Of an evaluation's captions, below the workspace."""

SUFFIX = ".jsonl"


class KeptCaptions:
    """The captions of one key, one JSON line each. A line that does not match its checksum is not used.

    Args:
        folder: of all keys; None keeps nothing and has nothing.
        key: digest of everything that determines a caption besides its question.
        questions: that matter, as digests; for inference, which asks one question of all, the sha256 of pictures.

    Attributes:
        captions: question → caption.
    """

    def __init__(self, folder: Path | None, key: str, questions: Iterable[str]) -> None:
        self.key = key
        self.file = None if folder is None else folder / f"{key}{SUFFIX}"
        there = self._read()
        self.captions = {question: there[question] for question in questions if question in there}

    def add(self, captions: Mapping[str, Caption]) -> None:
        """Keep captions on disk; a question that a server did not answer is asked again by the next run."""
        self.captions.update(captions)
        if self.file is None:
            return
        lines = [self._line(question, caption) for question, caption in captions.items() if not caption.reason]
        make_folder(self.file.parent)
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove the file."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _read(self) -> dict[str, Caption]:
        if self.file is None or not self.file.is_file():
            return {}
        found, is_whole = {}, True
        with self.file.open("rb") as lines:
            for line in lines:
                if (parsed := self._parsed(line)) is None:
                    is_whole = False
                else:
                    found[parsed[0]] = parsed[1]
        if not is_whole:
            logger.warning("Damaged lines in %s are not used: their captions are made again.", self.file)
            kept = (f"{self._line(question, caption)}\n" for question, caption in found.items())
            write_whole(self.file, "".join(kept), sync=False)
        return found

    def _parsed(self, line: bytes) -> tuple[str, Caption] | None:
        """Question and caption of a line; None if it is not a line that this key's `add` wrote."""
        try:
            note = json.loads(line)
            question, caption = note["question"], Caption(note["caption"], note["cut"])
            return (question, caption) if f"{self._line(question, caption)}\n".encode() == line else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def _line(self, question: str, caption: Caption) -> str:
        note = {"question": question, "caption": caption.text, "cut": caption.is_cut}
        return json.dumps({**note, "check": digest([self.key, note])[:16]}, ensure_ascii=False)


def question_digest(conversation: Conversation, images: ImageStore) -> str:
    """Hex sha256 of what is asked: all turns before the last answer, pictures by their bytes."""
    turns = conversation.turns[:-1] if conversation.turns[-1][0] == "assistant" else conversation.turns
    return digest([[role, [_by_content(part, images) for part in parts]] for role, parts in turns])


def _by_content(part: Part, images: ImageStore) -> str | dict[str, str]:
    return {"image": images.by_path(part.path).sha256} if isinstance(part, ImagePart) else part.text
