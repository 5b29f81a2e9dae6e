"""What a server is asked equals what the model in this process is asked, and its answers are held against that."""

import base64
import io
import json
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from conftest import PROJECT
from evaluation.servers import FaultyServer, Reply
from qwen_vl_lora.evaluation.inference import caption_gathered
from qwen_vl_lora.evaluation.kept_captions import KeptCaptions
from qwen_vl_lora.evaluation.served import ServedCaptioner, decoding_fields
from qwen_vl_lora.exceptions import ParameterError, ServerError
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.samples.conversations import Conversations, ask_about
from qwen_vl_lora.samples.named_pictures import gather_pictures
from samples.pictures import jpeg, write

DRAWS = SamplingParameters(temperature=0.7, top_p=0.9, seed=3)


@pytest.fixture
def base(base_path):
    return BaseModel("tiny", base_path("qwen2_vl"))


@pytest.fixture
def parameters():
    """`parameters(server={…}, prompt={…})`: those of the project, with changes of some groups."""
    tree = yaml.safe_load((PROJECT / "conf/base/parameters.yml").read_text(encoding="utf-8"))

    def make(server=None, **groups):
        changed = {name: {**tree[name], **values} for name, values in groups.items()}
        changed["inference"] = {**tree["inference"], "server": {**tree["inference"]["server"], **(server or {})}}
        return validate_parameters({**tree, **changed})

    return make


@pytest.fixture
def album(tmp_path):
    for number in range(5):
        write(tmp_path / "album" / f"{number}.jpg", jpeg(number, (60 + 10 * number, 50)))
    return tmp_path / "album"


def tokens_here(base, settings, images, sha256):
    encoder = ChatEncoder(base.load_processor(), settings.image, images)
    return len(encoder.encode_prompt(ask_about(images.by_sha256(sha256).path, settings.prompt)).ids)


def test_prompt_and_picture_are_those_of_the_model_in_this_process(base, parameters, album):
    with FaultyServer() as server:
        settings = parameters({"address": server.address, "image_tokens": "ignore"}, prompt={"system": "Be terse."})
        gathered = gather_pictures([album], settings.image, recursive=False)
        ServedCaptioner(base, None, settings).caption(gathered.images, gathered.usable[:1])
    (asked,) = server.asked
    system, user = asked["messages"]
    assert system == {"role": "system", "content": "Be terse."}
    picture, text = user["content"]
    assert text == {"type": "text", "text": "Describe this picture."}
    kind, _, data = picture["image_url"]["url"].partition("base64,")
    assert kind == "data:image/png;"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        sizer = ChatEncoder(base.load_processor(), settings.image, gathered.images).sizer
        assert sent.mode == "RGB"
        assert np.array_equal(sent, sizer.resize(gathered.images.open(gathered.usable[0])))
    assert {name: value for name, value in asked.items() if name != "messages"} == {
        "model": "captions",
        "max_tokens": 96,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
    }


def test_a_server_that_reads_this_disk_gets_paths_of_files_that_are_there_until_it_has_answered(
    base, parameters, album
):
    read = {}

    def reply(body):
        url = body["messages"][-1]["content"][0]["image_url"]["url"]
        place = Path(url2pathname(urlsplit(url).path))
        read[place] = place.read_bytes()
        return Reply() if len(read) > 1 else Reply(status=503)

    with FaultyServer(reply) as server:
        told = {"address": server.address, "image_tokens": "ignore", "requests": 2}
        captioner = ServedCaptioner(base, None, parameters({**told, "pictures": "file"}))
        gathered = gather_pictures([album], captioner.settings.image, recursive=False)
        captions = captioner.caption(gathered.images, gathered.usable)
    assert [caption.text for caption in captions] == ["a dog"] * 5
    assert len(read) == 5
    assert not any(place.parents[1].exists() for place in read)
    sizer = ChatEncoder(base.load_processor(), captioner.settings.image, gathered.images).sizer
    for place, data in read.items():
        with Image.open(io.BytesIO(data)) as sent:
            assert np.array_equal(sent, sizer.resize(gathered.images.open(place.stem)))


def test_paths_of_files_are_for_a_server_on_this_machine(parameters):
    with pytest.raises(ParameterError, match="pictures: `file` is for a server on this machine.*https://example.org"):
        parameters({"address": "https://example.org/v1", "pictures": "file"})


@pytest.mark.parametrize(
    ("kind", "greedy", "drawn", "not_set"),
    [
        ("vllm", {"repetition_penalty": 1.0}, {"top_k": -1, "top_p": 0.9}, []),
        ("sglang", {"repetition_penalty": 1.0}, {"top_k": -1, "top_p": 0.9}, []),
        ("llama.cpp", {"repeat_penalty": 1.0}, {"top_k": 0, "top_p": 0.9}, []),
        ("openai", {}, {"top_p": 0.9}, ["repetition_penalty", "enable_thinking"]),
    ],
)
def test_each_kind_of_server_is_told_decoding_in_its_own_way(parameters, kind, greedy, drawn, not_set):
    thinking = {} if kind == "openai" else {"chat_template_kwargs": {"enable_thinking": False}}
    fields, unknown = decoding_fields(kind, parameters().generation, SamplingParameters(), thinks=True)
    assert fields == {"max_tokens": 96, "temperature": 0.0, **thinking, **greedy}
    assert unknown == not_set
    fields, _ = decoding_fields(kind, parameters().generation, DRAWS, thinks=False)
    assert fields == {"max_tokens": 96, "temperature": 0.7, **greedy, **drawn}


def test_transformers_serve_is_told_decoding_as_a_generation_config(parameters):
    fields, _ = decoding_fields("transformers", parameters().generation, DRAWS, thinks=False)
    own = json.loads(fields.pop("generation_config"))
    assert own == {"max_new_tokens": 96, "repetition_penalty": 1.0, "num_beams": 1, "do_sample": True, "top_k": 0}
    assert fields == {"max_tokens": 96, "temperature": 0.7, "top_p": 0.9}


def test_each_picture_is_drawn_with_a_seed_of_its_own_that_stays(base, parameters, album):
    seeds = []
    with FaultyServer() as server:
        settings = parameters({"address": server.address, "image_tokens": "ignore"})
        gathered = gather_pictures([album], settings.image, recursive=False)
        for order in (gathered.usable, gathered.usable[::-1]):
            ServedCaptioner(base, None, settings, DRAWS).caption(gathered.images, order)
            seeds.append(
                {asked["messages"][0]["content"][0]["image_url"]["url"]: asked["seed"] for asked in server.asked}
            )
            server.asked.clear()
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == 5


def test_a_conversation_is_sent_with_its_turns_up_to_the_last_answer(base, parameters, images):
    one, other = [entry.path for entry in images][:2]
    said = [
        ("user", f"Here: <|vision_start|>{one}<|vision_end|> and here: <|vision_start|>{other}<|vision_end|>. Well?"),
        ("assistant", "Two dogs."),
        ("user", "Which is bigger?"),
        ("assistant", "The first."),
    ]
    turns = [{"from": role, "value": text} for role, text in said]
    (conversation,) = Conversations([{"id": "x", "conversations": turns}])
    with FaultyServer() as server:
        settings = parameters({"address": server.address, "image_tokens": "ignore"})
        captioner = ServedCaptioner(base, None, settings)
        ((answers),) = captioner.answered(images, [("x", conversation)])
    assert answers["x"].text == "a dog"
    (asked,) = server.asked
    assert [message["role"] for message in asked["messages"]] == ["user", "assistant", "user"]
    parts = asked["messages"][0]["content"]
    assert [part.get("text", "picture") for part in parts] == ["Here: ", "picture", " and here: ", "picture", ". Well?"]
    assert asked["messages"][1]["content"] == "Two dogs."


def test_a_server_whose_prompt_has_another_length_is_refused(base, parameters, album):
    with FaultyServer(lambda _: Reply(tokens=999)) as server:
        settings = parameters({"address": server.address})
        gathered = gather_pictures([album], settings.image, recursive=False)
        here = tokens_here(base, settings, gathered.images, gathered.usable[0])
        told = rf"prompt has 999 tokens; here it has {here}, 16 of them for the picture.*min_pixels.*processor_config"
        with pytest.raises(ServerError, match=told):  # of several pictures any may be answered first
            ServedCaptioner(base, None, settings).caption(gathered.images, gathered.usable[:1])
        ignoring = parameters({"address": server.address, "image_tokens": "ignore"})
        assert ServedCaptioner(base, None, ignoring).caption(gathered.images, gathered.usable)[0].text == "a dog"


def test_a_server_that_counts_no_tokens_is_reported_once(base, parameters, album, caplog):
    with FaultyServer(lambda _: Reply(tokens=None)) as server:
        settings = parameters({"address": server.address})
        gathered = gather_pictures([album], settings.image, recursive=False)
        ServedCaptioner(base, None, settings).caption(gathered.images, gathered.usable)
    assert [message for message in caplog.messages if "does not count tokens" in message] == [
        "The server does not count tokens, so it is not known whether it resizes pictures."
    ]


def test_a_refused_picture_stands_in_the_table_and_is_asked_again_by_the_next_run(base, parameters, album, tmp_path):
    refuses = [True]

    def reply(body):
        number = numbers[body["messages"][0]["content"][0]["image_url"]["url"]]
        if number == 1 and refuses:
            return Reply(status=400, body=b'{"error": {"message": "too dark"}}')
        return Reply(f"picture {number}", finish="length" if number == 2 else "stop", tokens=tokens)

    with FaultyServer(reply) as server:
        settings = parameters({"address": server.address})
        gathered = gather_pictures([album], settings.image, recursive=False)
        tokens = tokens_here(base, settings, gathered.images, gathered.usable[0])
        captioner = ServedCaptioner(base, None, settings)
        encoder = ChatEncoder(base.load_processor(), settings.image, gathered.images)
        numbers = {}
        for number, sha256 in enumerate(gathered.usable):
            body = captioner._body(encoder, ask_about(gathered.images.by_sha256(sha256).path, settings.prompt), {})
            numbers[json.loads(body)["messages"][0]["content"][0]["image_url"]["url"]] = number
        kept = KeptCaptions(tmp_path, "key", gathered.usable)
        table = caption_gathered(captioner, gathered, kept)
        assert list(table["caption"]) == ["picture 0", "", "picture 2", "picture 3", "picture 4"]
        assert list(table["reason"][[0, 1]]) == ["", "not_captioned: the server refuses it, HTTP 400: too dark"]
        assert list(table["cut"]) == ["false", "", "true", "false", "false"]
        assert len(kept.file.read_text().splitlines()) == 4
        server.asked.clear()
        refuses.clear()
        kept = KeptCaptions(tmp_path, "key", gathered.usable)
        again = caption_gathered(ServedCaptioner(base, None, settings), gathered, kept)
        assert len(server.asked) == 1
    assert isinstance(again, pd.DataFrame)
    assert again["caption"][1] == "picture 1"


def test_a_server_that_captions_nothing_is_an_error(base, parameters, album, tmp_path):
    with FaultyServer(lambda _: Reply(status=400, body=b"no pictures, please")) as server:
        settings = parameters({"address": server.address})
        gathered = gather_pictures([album], settings.image, recursive=False)
        with pytest.raises(ServerError, match=r"captioned none of 5 pictures; of the first, .*no pictures, please"):
            caption_gathered(
                ServedCaptioner(base, None, settings), gathered, KeptCaptions(tmp_path, "key", gathered.usable)
            )


def test_notes_are_kept_for_each_server_model_and_setting(base, parameters):
    with FaultyServer(models=["a", "b"]) as server, FaultyServer(models=["a", "b"]) as other:
        keys = [
            ServedCaptioner(base, None, parameters({"address": address, "model": model, **more}), sampling).key
            for address, model, sampling, more in [
                (server.address, "a", SamplingParameters(), {}),
                (server.address, "a", SamplingParameters(), {"requests": 3, "timeout": 9.0}),
                (server.address, "b", SamplingParameters(), {}),
                (other.address, "a", SamplingParameters(), {}),
                (server.address, "a", DRAWS, {}),
                (server.address, "a", DRAWS.model_copy(update={"seed": 4}), {}),
                (server.address, "a", SamplingParameters(), {"image_tokens": "ignore"}),
            ]
        ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 6
