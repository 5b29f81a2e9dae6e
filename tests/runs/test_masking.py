"""No secret reaches a record."""

import base64
import json
import re
import shlex
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_lora.runs import masking
from qwen_vl_lora.runs.masking import MASK, mask_command, mask_text, mask_tree, remember


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(masking, "_remembered", set())


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://user:hunter2@github.com/a/b.git", "hunter2"),
        ("https://ghp_abcdefghijklmnop1234@github.com/a/b.git", "ghp_abcdefghijklmnop1234"),
        ("kedro run --params swanlab.api_key=abc123,lora.r=4", "abc123"),
        ("kedro run --params 'training_args.hub_token=abc123'", "abc123"),
        ("curl -H 'Authorization: Bearer abc.def'", "abc.def"),
        ("kedro run --params x=hf_ABCDEFGHIJKLMNOPQRST", "hf_ABCDEFGHIJKLMNOPQRST"),
        ("password: swordfish", "swordfish"),
    ],
)
def test_secrets_in_texts_are_masked(text, secret):
    masked = mask_text(text)
    assert secret not in masked
    assert "***" in masked


def test_what_is_no_secret_stays():
    text = "kedro run --pipelines training --params lora.r=4,generation.max_new_tokens=128,base_model=a/b"
    assert mask_text(text) == text
    assert mask_text("row 3: special_token: The caption holds <|im_end|>") == (
        "row 3: special_token: The caption holds <|im_end|>"
    )
    tree = {"max_new_tokens": 96, "tokenizer": "auto", "url": "https://example.org/a", "prompt": "a secret garden"}
    assert mask_tree(tree) == tree


def test_settings_are_masked_by_the_name_of_their_key():
    tree = {"swanlab": {"api_key": "abc"}, "training_args": {"hub_token": "t", "seed": 4}, "list": [{"password": "p"}]}
    assert mask_tree(tree) == {
        "swanlab": {"api_key": "***"},
        "training_args": {"hub_token": "***", "seed": 4},
        "list": [{"password": "***"}],
    }


# Where a secret is planted; `{}` is the secret, whatever it holds.
QUOTED = [
    "password='{}'",
    'password="{}"',
    "{{'password': '{}', 'r': 4}}",
    '{{"api_key": "{}"}}',
    'training_args.hub_token = "{}"',
    '{{"AccountKey": "{}"}}',
]
BARE = [
    "kedro run --params swanlab.api_key={},lora.r=4",
    "AWS_SECRET_ACCESS_KEY={} kedro run",
    "AccountName=a;AccountKey={};EndpointSuffix=b",
    "Uid=a;Pwd={};",
    "accessToken={}",
    "hub_token: {}",
    "swanlab login --api-key {} --relogin",
    "Authorization: Token {}",
    "Authorization: {}",
    "'authorization': 'Bearer {}'",
]
QUERY = [
    "https://a.example/c.csv?sv=2020&sig={}",
    "https://a.example/c.csv?X-Amz-Signature={}&X-Amz-Date=1",
    "https://a.example/c.csv?X-Amz-Security-Token={}",
    "https://a.example/c.csv?X-Amz-Credential={}",
    "https://a.example/c.csv?X-Goog-Signature={}",
    "https://a.example/c.csv?OSSAccessKeyId=a&Signature={}&Expires=1",
    "https://a.example/c.csv?access_token={}#top",
    "https://maps.example/x?key={}",
]
USER = [
    "https://user:{}@host.example/a/b.git",
    "https://{}@host.example/a/b.git",
    "captions_file=https://user:{}@host.example/c.csv,lora.r=4",
    "https:/user:{}@host.example/c.csv not found",  # as pathlib writes it
    "MODELSCOPE_ENDPOINT=https://user:{}@hub.example/",
    "fatal: unable to access 'https://user:{}@host.example/b.git/': 403",
    "postgresql://user:{}@host.example:5432/db",
    "ssh://user:{}@host.example/b.git",
]
letters = string.ascii_letters + string.digits


def odd_words(symbols):
    return st.text(alphabet=letters + symbols, min_size=1, max_size=12).map(lambda word: f"PLANTED{word}PLANTED")


@pytest.mark.parametrize("place", QUOTED)
@settings(max_examples=20, deadline=None)
@given(odd_words(" ,;:@%&=/?#!$()[]{}|~^+-."))
def test_a_quoted_secret_is_masked_to_its_end(place, secret):
    assert "PLANTED" not in mask_text(place.format(secret))


@pytest.mark.parametrize("place", BARE)
@settings(max_examples=20, deadline=None)
@given(odd_words("@%/?#!$|~^+-._"))
def test_a_secret_beside_its_name_is_masked_to_its_end(place, secret):
    assert "PLANTED" not in mask_text(place.format(secret))


@pytest.mark.parametrize("place", QUERY)
@settings(max_examples=20, deadline=None)
@given(odd_words("%/+-._~=:@!$,;"))
def test_a_signature_in_an_address_is_masked(place, secret):
    assert "PLANTED" not in mask_text(place.format(secret))


@pytest.mark.parametrize("place", USER)
@settings(max_examples=20, deadline=None)
@given(odd_words("@:%!$&*+,;=()._~-"))
def test_the_user_of_an_address_is_masked_up_to_the_last_at_sign(place, secret):
    assert "PLANTED" not in mask_text(place.format(secret))
    assert "host" in mask_text(place.format(secret)) or "hub" in mask_text(place.format(secret))


@pytest.mark.parametrize("secret", ["pa/ss", "p@s/s", "p?w", "p#w", "two words", "p/a@s/s"])
def test_a_password_that_should_have_been_encoded_is_masked_too(secret):
    assert mask_text(f"https://user:{secret}@host.example/c.csv") == "https://***@host.example/c.csv"


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 8,
        "ms-" + "aB3" * 8,
        "ms-12345678-90ab-cdef-1234-567890abcdef",
        "ghp_" + "aB3" * 8,
        "github_pat_" + "aB3_" * 8,
        "glpat-" + "aB3-" * 6,
        "sk-" + "aB3" * 8,
        "sk-proj-" + "aB3-" * 8,
        "xoxb-1234567890-abc",
        "AKIA" + "ABCD1234" * 2,
        "LTAI" + "abCD1234" * 2,
        "AIza" + "aB3-" * 9,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.SflKxwRJSMeKKF2QT4",
        "Basic " + base64.b64encode(b"user:PLANTED").decode(),
        "Bearer PLANTED.abc123",
    ],
)
@pytest.mark.parametrize("place", ["{}", "refused: {}.", "['{}', 1]", "https://a.example/{}/x", "x={}", '"{}"'])
def test_a_secret_is_known_by_its_look(place, secret):
    assert secret.rpartition(" ")[2] not in mask_text(place.format(secret))


def test_a_private_key_is_masked_to_its_end():
    key = "-----BEGIN RSA PRIVATE KEY-----\nPLANTED\nPLANTED\n-----END RSA PRIVATE KEY-----\nafter"
    assert "PLANTED" not in mask_text(key)
    assert mask_text(key).endswith("after")


ORDINARY = [
    "row 3: special_token: The caption holds <|im_end|>",
    "a sign with the password: open",
    "a secret garden, a token: of love",
    "a ring bearer standing beside a bride, basic training, Basic principles of design",
    "data/photos/user@2x.png photo@home.jpg me@example.org",
    "git@github.com:owner/name.git",
    "https://registry.example:5000/owner/name@sha256",
    "https://example.org/a: write to me@example.org",
    "modelscope/ms-marco-MiniLM-L6-v2 ms-swift hf_datasets_cache_folder_2024 sk-learn-contrib-something",
    "secrets/token/passwords.csv token_length.csv my-password-list.txt",
    "max_new_tokens=128,tokenizer=auto,pad_token=<pad>,eos_token: <|endoftext|>",
    "use_auth_token=True, hub_token: null, api_key=None",
    "training_args.hub_token: the project owns it; nearest: hub",
    "3f9a2c" * 10 + " 2026-11-29T08.30.06.000Z",
    "Qwen/Qwen2-VL-2B-Instruct@9f8e7d6c5b4a 描述这张图片的内容。 COCO Yes:",
    "C:/Users/me/a@b.png file:///data/a@b.csv s3://bucket/a@2x.png",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_stay(text):
    assert mask_text(text) == text
    assert mask_tree({"prompt": {"user": text}}) == {"prompt": {"user": text}}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["a", "dog", "on", "the", "sofa,", "blue", "Token", "password", "sign."]), max_size=12))
def test_sentences_of_captions_stay(words):
    assert mask_text(" ".join(words)) == " ".join(words)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([*QUOTED, *BARE, *QUERY, *USER, *ORDINARY, "\n", "'", '"', "=", "@", "://"]), max_size=5)
)
def test_what_is_masked_stays_as_it_is(parts):
    text = mask_text(" ".join(parts))
    assert mask_text(text) == text


@settings(max_examples=40, deadline=None)
@given(odd_words(" ,;:@%&=/?#!$()|~^+-.'"))
def test_the_command_line_is_masked_argument_by_argument(secret):
    settings_last = ["--params", f"lora.r=4,hub_token={secret}"]
    given = [["--token", secret]]
    if re.search(r",\s*[\w.-]+\s*=", secret) is None:  # `, name=` begins the next setting
        given += [["--params", f"swanlab.api_key={secret},lora.r=4"], settings_last, [f"--password={secret}"]]
    for arguments in given:
        assert "PLANTED" not in shlex.join(mask_command(["kedro", "run", *arguments]))
    assert "lora.r=4" in shlex.join(mask_command(settings_last))


def test_every_value_below_a_secret_name_is_masked():
    tree = {
        "apiKey": 12345678,
        "password": ["a", "b"],
        "credentials": {"key": "x", "nested": {"y": "z"}},
        "db_pwd": "p",
        "https://u:PLANTED@h": 1,
        "urls": ("https://u:PLANTED@h/x",),
    }
    assert "PLANTED" not in json.dumps(mask_tree(tree))
    assert mask_tree(tree)["credentials"] == {"key": MASK, "nested": {"y": MASK}}
    assert mask_tree(tree)["password"] == [MASK, MASK]
    assert mask_tree(tree)["apiKey"] == MASK
    flags = {"hub_token": None, "use_auth_token": True, "password": ""}
    assert mask_tree(flags) == flags


def test_what_the_process_was_given_is_masked_wherever_it_turns_up():
    environment = {
        "HUB_TOKEN": "Xy7-planted",
        "PROXY": "http://me:Xy8-planted@proxy/",
        "PWD": "/data/project",
        "A": "b",
    }
    remember({**environment, "swanlab": {"api_key": "Xy9-planted"}}, ["--params", "f=https://u:Xy0@planted@h/x"])
    text = "input_value='Xy7-planted' Xy8-planted; Xy9-planted, Xy0@planted in /data/project"
    assert mask_text(text) == "input_value='***' ***; ***, *** in /data/project"


def test_a_plain_word_is_not_masked_everywhere():
    remember({"DB_PASSWORD": "kitchen", "APP_SECRET": "abc", "SECRET_TOKEN": "livingroom", "CREDENTIALS": "/etc/Key1"})
    text = "a kitchen, an abc and a livingroom in /etc/Key1"
    assert mask_text(text) == text


@pytest.mark.parametrize("piece", ["a", "https://u:", "a.b-c_", '"', "--token ", "x:", "password: ", "eyJaaaaa.", "="])
def test_masking_takes_time_in_proportion(piece):
    import time

    def seconds(length):
        started = time.process_time()
        mask_text((piece * length)[:length])
        return time.process_time() - started

    assert seconds(24_000) < 12 * seconds(6_000) + 0.2
