"""Captions by a server in place of the model in this process: what is sent to it, and what is held against its word.

Prompt, system text, picture size and decoding are those of the settings, which an adapter's record has determined.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qwen_vl_lora.evaluation.chat_client import Answer, NotAnsweredError, Served, connected
from qwen_vl_lora.evaluation.generation import GREEDY, Caption, seed_of
from qwen_vl_lora.exceptions import ServerError
from qwen_vl_lora.inference_parameters import SamplingParameters, ServerKind
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, template_options
from qwen_vl_lora.parameters import GenerationParameters, Parameters
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.samples.conversations import Conversation, ImagePart, TextPart, ask_about
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)

SERVER = "server"
"""The name of the servers together, where a process is named."""


class _Asked(NamedTuple):
    """A question under way.

    Attributes:
        tokens, image_tokens: of its prompt, as in training.
        folder: of its pictures, where the server reads them from the disk.
    """

    name: Any
    tokens: int
    image_tokens: int
    folder: Path | None


class ServedCaptioner:
    """Servers that caption pictures; of the base only the processor is loaded here.

    Attributes:
        facts: what the servers are and how they decode, for the run's record.

    Raises:
        AdapterError: if the adapter was trained on another base.
        ServerError: if no server answers, or it is not clear which model it serves.
    """

    def __init__(
        self,
        base_model: BaseModel,
        adapter: Adapter | None,
        settings: Parameters,
        sampling: SamplingParameters = GREEDY,
    ) -> None:
        if adapter is not None:
            adapter.check_base(base_model)
        self.settings = settings
        self.base_model = base_model
        self.adapter = adapter
        self._server = settings.inference.server
        self._sampling = sampling
        self._processor = base_model.load_processor()
        with connected(self._server) as servers:
            self.served: Served = servers.look()
        thinks = bool(template_options(self._processor))
        self._decoding, not_set = decoding_fields(self.served.kind, settings.generation, sampling, thinks=thinks)
        logger.info("Captions by %s (%s) at %s.", self.served.model, self.served.kind, ", ".join(self.served.says))
        if not_set:
            logger.warning("This kind of server takes no %s: it is the server's own.", ", ".join(not_set))
        self.facts = {
            "kind": self.served.kind,
            "model": self.served.model,
            "says": _bounded(self.served.says),
            "decoding": self._decoding,
            "not_set": not_set,
            "image_tokens": self._server.image_tokens,
        }

    @property
    def key(self) -> str:
        """Digest (16 hex digits) of everything known that determines a picture's caption besides its bytes."""
        return digest(
            {
                "server": [sorted(self._server.addresses), self.served.kind, self.served.model],
                "base_model": self.base_model.fingerprint,
                "adapter": None if self.adapter is None else self.adapter.weights_sha256,
                "prompt": self.settings.prompt.model_dump(include={"user", "system"}),
                "image": self.settings.image.size,
                "decoding": self._decoding,
                "seed": self._sampling.seed if self._sampling.temperature else None,
                "image_tokens": self._server.image_tokens,
            }
        )[:16]

    def caption(self, images: ImageStore, sha256s: Sequence[str], description: str | None = None) -> list[Caption]:
        """One caption for each picture, in order; one that the server refuses has a reason in place of a text."""
        captions: dict[str, Caption] = {}
        for part, _ in self.written(images, sha256s, known=0):
            captions.update(part)
        return [captions[sha256] for sha256 in sha256s]

    def written(
        self, images: ImageStore, sha256s: Sequence[str], known: int
    ) -> Iterator[tuple[dict[str, Caption], str]]:
        """Captions of pictures as they come, each part with the name of who wrote it.

        Args:
            known: number of pictures that were captioned before.
        """
        asked = ((sha256, ask_about(images.by_sha256(sha256).path, self.settings.prompt)) for sha256 in sha256s)
        for part in self.answered(images, asked, known):
            yield {str(name): caption for name, caption in part.items()}, SERVER

    def answered(
        self, images: ImageStore, asked: Iterable[tuple[Any, Conversation]], known: int = 0
    ) -> Iterator[dict[Any, Caption]]:
        """Answers to named conversations, as they come. An answer at their end is not sent.

        Raises:
            ServerError: as `Servers.answers`; or if the server's prompts have other lengths than in training.
        """
        encoder = ChatEncoder(self._processor, self.settings.image, images)
        most_tokens = self.settings.generation.max_new_tokens

        def questions(root: Path | None) -> Iterator[tuple[_Asked, Callable[[], bytes]]]:
            for number, (name, conversation) in enumerate(asked):
                prompt = encoder.encode_prompt(conversation)
                folder = None if root is None else root / str(number)
                body = functools.partial(self._body, encoder, conversation, self._seed(prompt.images), folder)
                yield _Asked(name, len(prompt.ids), int(prompt.is_image.sum()), folder), body

        with connected(self._server) as servers, self._folder() as root:
            for results in servers.answers(questions(root), self.served, most_tokens, known):
                captions: dict[Any, Caption] = {}
                for question, answer in results:
                    if question.folder is not None:
                        shutil.rmtree(question.folder, ignore_errors=True)
                    if isinstance(answer, NotAnsweredError):
                        captions[question.name] = Caption("", False, f"not_captioned: {answer}")
                    else:
                        self._check_tokens(question, answer)
                        captions[question.name] = Caption(answer.text, answer.finish == "length")
                yield captions

    @contextmanager
    def _folder(self) -> Iterator[Path | None]:
        """The folder of pictures that the server reads from the disk: those of questions under way."""
        if self._server.pictures == "data":
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-pictures-") as folder:
            yield Path(folder)

    def _seed(self, images: Sequence[str]) -> dict[str, int]:
        return {"seed": seed_of(self._sampling, images)} if self._sampling.temperature else {}

    def _body(
        self, encoder: ChatEncoder, conversation: Conversation, seed: dict[str, int], folder: Path | None = None
    ) -> bytes:
        messages = [
            {"role": role, "content": [_part(encoder, part, folder) for part in parts]}
            if any(isinstance(part, ImagePart) for part in parts)
            else {"role": role, "content": "".join(part.text for part in parts if isinstance(part, TextPart))}
            for role, parts in _question(conversation).turns
        ]
        return json.dumps({"model": self.served.model, "messages": messages, **self._decoding, **seed}).encode()

    def _check_tokens(self, question: _Asked, answer: Answer) -> None:
        """Raises: ServerError if the server's prompt has another length: another picture size, template or base."""
        if self._server.image_tokens == "ignore" or answer.prompt_tokens == question.tokens:
            return
        if answer.prompt_tokens is None:
            if not self._is_uncounted:
                logger.warning("The server does not count tokens, so it is not known whether it resizes pictures.")
            self._is_uncounted = True
            return
        raise ServerError(
            f"The server's prompt has {answer.prompt_tokens} tokens; here it has {question.tokens}, "
            f"{question.image_tokens} of them for the picture. A server that resizes pictures again writes other "
            'captions: give it limits that leave them as they are (vLLM: --mm-processor-kwargs \'{"min_pixels": …, '
            '"max_pixels": …}\'; transformers serve: `size` in the served processor_config.json), or larger pictures. '
            "Another base or chat template also differs: set base_model to the model that is served. "
            f"{self._server.block}.image_tokens: ignore takes its captions nevertheless."
        )

    _is_uncounted = False


def decoding_fields(
    kind: ServerKind, generation: GenerationParameters, sampling: SamplingParameters, *, thinks: bool
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a request that set decoding, and what this kind of server cannot be told.

    Args:
        thinks: whether the chat template can think, which is always off.
    """
    draws = sampling.temperature > 0
    fields: dict[str, Any] = {"max_tokens": generation.max_new_tokens, "temperature": sampling.temperature}
    if draws:
        fields["top_p"] = sampling.top_p
    if kind == "openai":
        return fields, ["repetition_penalty", *(["enable_thinking"] if thinks else [])]
    if thinks:
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    if kind == "transformers":
        own = {
            "max_new_tokens": generation.max_new_tokens,
            "repetition_penalty": generation.repetition_penalty,
            "num_beams": 1,
            "do_sample": draws,
            **({"top_k": 0} if draws else {}),
        }
        return {**fields, "generation_config": json.dumps(own)}, []
    penalty = "repeat_penalty" if kind == "llama.cpp" else "repetition_penalty"
    top_k = {"top_k": 0 if kind == "llama.cpp" else -1} if draws else {}
    return {**fields, penalty: generation.repetition_penalty, **top_k}, []


def _question(conversation: Conversation) -> Conversation:
    """The conversation up to its last answer."""
    role, _ = conversation.turns[-1]
    return Conversation(conversation.id, conversation.turns[:-1] if role == "assistant" else conversation.turns)


def _part(encoder: ChatEncoder, part: TextPart | ImagePart, folder: Path | None) -> Mapping[str, Any]:
    """A part of a message. Pictures are upright, RGB, lossless, and have the model's size."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    sha256 = encoder.images.by_path(part.path).sha256
    return picture_part(encoder.sizer.resize(encoder.images.open(sha256)), folder and folder / f"{sha256}.png")


def picture_part(picture: Image.Image, file: Path | None = None) -> Mapping[str, Any]:
    """A picture in a message, lossless: inside of it, or in a file that it names."""
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    if file is None:
        address = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(written.getvalue())
        address = file.as_uri()
    return {"type": "image_url", "image_url": {"url": address}}


def _bounded(says: Mapping[str, Any]) -> dict[str, Any]:
    """What servers say of themselves, as far as it is short."""
    return {
        address: said if len(json.dumps(said)) <= 4096 else "more than 4096 characters"
        for address, said in says.items()
    }
