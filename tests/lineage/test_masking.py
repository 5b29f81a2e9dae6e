"""No secret reaches a record."""

import pytest

from qwen_vl_lora.lineage.masking import mask_text, mask_tree


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
