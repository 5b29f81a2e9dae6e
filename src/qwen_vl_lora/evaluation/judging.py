"""A pairwise judge: which of two captions describes the picture better, by a vision model behind a server.

The judge sees the picture and two captions without the names of their sides, and is asked twice, in both orders. A
side wins if both answers prefer it; answers that contradict each other are a tie, because the order decided them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from qwen_vl_lora.evaluation.chat_client import NotAnsweredError, Served, connected
from qwen_vl_lora.evaluation.metrics import mean_interval
from qwen_vl_lora.evaluation.predictions import Prediction
from qwen_vl_lora.evaluation.served import decoding_fields, picture_part
from qwen_vl_lora.evaluation_parameters import JudgeParameters
from qwen_vl_lora.exceptions import ServerError
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.parameters import GenerationParameters, ScoringParameters
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)

QUESTION = """\
Here are two captions of this picture.

Caption A: {a}

Caption B: {b}

Which caption describes the picture better? Judge by what is true of the picture and what is left out, not by length or
style. Answer with one word: A, B or tie."""

TIE = "tie"

_SIDE = 1024  # px: the longest side of the picture that is sent
_DECODING = GenerationParameters(max_new_tokens=16, repetition_penalty=1.0, batch_size=1)
_ANSWER = re.compile(r"\W*(?:answer\W+)?(?:caption\W+)?(a|b|tie)\W*(?:$|\n|\.\s)", re.IGNORECASE)

_WORTH = {"tuned": 1.0, TIE: 0.5}
"""Verdict → its value for the share of the tuned side; another side's win is 0."""


class _Asked(NamedTuple):
    """A question to the judge.

    Attributes:
        row: of the prediction.
        side: that is compared with the tuned one.
        first: whether `side` is caption A.
    """

    row: int
    side: str
    first: bool


def judge_captions(
    predictions: Sequence[Prediction], sides: Sequence[str], images: ImageStore, judge: JudgeParameters
) -> tuple[dict[str, list[str | None]], Served]:
    """Verdicts on each side against the tuned one, in the order of the predictions, and what the judge is.

    A verdict is the name of the side that won, `tie`, or None if the judge gave no usable answer or there is no
    picture. Equal captions are a tie, and not asked about.

    Raises:
        ServerError: if the judge is gone, or gave no usable answer to any question.
    """
    asked = list(_questions(predictions, sides))
    with connected(judge) as servers:
        served: Served = servers.look()
        logger.info("Judged by %s (%s) at %s.", served.model, served.kind, ", ".join(served.says))
        answers: dict[_Asked, str | None] = {}
        said = ""
        bodies = ((one, _body(one, predictions[one.row], images, served)) for one in asked)
        with tqdm(total=len(asked), desc="judging", unit="answer", leave=False, disable=None) as bar:
            for results in servers.answers(bodies, served, _DECODING.max_new_tokens, known=0):
                for one, answer in results:
                    text = str(answer) if isinstance(answer, NotAnsweredError) else answer.text
                    answers[one] = None if isinstance(answer, NotAnsweredError) else _preferred(one, text)
                    said = said if answers[one] else text
                bar.update(len(results))
    if asked and not any(answers.values()):
        raise ServerError(
            f"The judge {served.model} gave no usable answer to any of {len(asked)} questions: expected A, B or tie; "
            f"got {said[:200]!r}. Name another vision model by {judge.block}, or set {judge.block}.address: null."
        )
    rows = range(len(predictions))
    return {side: [_verdict(row, side, predictions[row], answers) for row in rows] for side in sides}, served


def summarize_verdicts(
    verdicts: Sequence[str | None], pictures: Sequence[str], scoring: ScoringParameters
) -> dict[str, Any]:
    """Wins, ties, and the tuned side's share: wins and half the ties, with its 95 % interval over pictures."""
    judged = [(verdict, picture) for verdict, picture in zip(verdicts, pictures, strict=True) if verdict is not None]
    counts = {
        "tuned_wins": sum(verdict == "tuned" for verdict, _ in judged),
        "ties": sum(verdict == TIE for verdict, _ in judged),
        "judged": len(judged),
        "not_judged": len(verdicts) - len(judged),
    }
    if not judged:
        return {**counts, "tuned_share": None, "interval": None}
    import numpy as np

    worth = np.array([_WORTH.get(verdict, 0.0) for verdict, _ in judged])
    interval = mean_interval(worth, [picture for _, picture in judged], scoring.bootstrap_samples, scoring.seed)
    return {**counts, "tuned_share": float(worth.mean()), "interval": list(interval)}


def _questions(predictions: Sequence[Prediction], sides: Sequence[str]) -> Iterator[_Asked]:
    for row, item in enumerate(predictions):
        for side in sides:
            if item.image_path and item.written(side).caption != item.tuned_caption:
                yield from (_Asked(row, side, first) for first in (True, False))


def _body(one: _Asked, item: Prediction, images: ImageStore, served: Served) -> Callable[[], bytes]:
    """Makes the request, with the picture as it is stored: upright, RGB, at most 1,024 px on its longest side."""
    captions = [item.written(one.side).caption, item.tuned_caption]
    a, b = (" ".join(caption.split()) for caption in (captions if one.first else reversed(captions)))
    return partial(_write, item.image_path, QUESTION.format(a=a, b=b), images, served)


def _write(path: str, question: str, images: ImageStore, served: Served) -> bytes:
    picture = images.open(images.by_path(path).sha256)
    picture.thumbnail((_SIDE, _SIDE))
    decoding, _ = decoding_fields(served.kind, _DECODING, SamplingParameters(), thinks=False)
    content = [picture_part(picture), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": served.model, "messages": messages, **decoding}).encode()


def _preferred(one: _Asked, text: str) -> str | None:
    """The side that an answer prefers, `tie`, or None of an answer that is neither."""
    found = _ANSWER.match(text)
    if found is None:
        return None
    word = found[1].lower()
    return TIE if word == TIE else one.side if (word == "a") == one.first else "tuned"


def _verdict(row: int, side: str, item: Prediction, answers: Mapping[_Asked, str | None]) -> str | None:
    if not item.image_path:
        return None
    if item.written(side).caption == item.tuned_caption:
        return TIE
    one, two = (answers.get(_Asked(row, side, first)) for first in (True, False))
    if one is None or two is None:
        return None
    return one if one == two else TIE
