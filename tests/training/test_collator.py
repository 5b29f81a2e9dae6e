"""Shared rows, stored features and packed passes give the loss and gradients of plain rows."""

import pytest
import torch
from torch.nn import functional

from qwen_vl_lora.features.inputs import StoredPictures
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, rope_positions
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.training.collator import RowCollator
from qwen_vl_lora.training.rows import Row, group_rows, plan_passes
from tiny_models import FAMILIES, SHARING, captioned

CAPTIONS = ["big red circle", "a much longer caption about a small blue square on grey", "star", "two green crosses"]


@pytest.fixture(params=FAMILIES)
def base(request, base_path):
    return BaseModel("tiny", base_path(request.param))


@pytest.fixture
def parts(base, images, image_parameters):
    """Encoder and the encoded conversations: every picture with every caption."""
    encoder = ChatEncoder(base.load_processor(), image_parameters, images)
    records = [
        captioned(f"{entry.id}/{number}", entry.path, caption)
        for entry in images
        for number, caption in enumerate(CAPTIONS)
    ]
    return encoder, [encoder.encode(conversation) for conversation in Conversations(records)]


def summed_loss(model, forward):
    logits = model(**forward.inputs, use_cache=False).logits
    return functional.cross_entropy(logits[tuple(forward.source)], forward.labels, reduction="sum")


def plain_loss(model, encoder, conversation):
    """The loss as a textbook computes it: one sequence, pixels, positions by the model, all logits, shifted labels."""
    pixels = encoder.pixels(conversation.images)
    ids = torch.from_numpy(conversation.ids)[None]
    types = torch.from_numpy(conversation.is_image).long()[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels).logits
    labels = torch.where(torch.from_numpy(conversation.scored), ids[0], -100)
    return functional.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("base", SHARING, indirect=True)
def test_one_row_of_answers_has_the_loss_and_gradients_of_separate_sequences(base, parts):
    from qwen_vl_lora.model.lora import add_adapter
    from qwen_vl_lora.parameters import LoraParameters

    encoder, conversations = parts
    lora = LoraParameters(
        r=4,
        lora_alpha=4,
        lora_dropout=0.0,
        bias="none",
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=False,
        use_dora=False,
        init_lora_weights=False,
    )
    model = add_adapter(base.load_model("float32", "cpu"), lora, "frozen", seed=0)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}

    plain = sum(plain_loss(model, encoder, conversation) for conversation in conversations)
    plain_gradients = torch.autograd.grad(plain, trained.values())
    collator = RowCollator(encoder, encoder.pixels)
    shared = summed_loss(model, collator(group_rows(conversations, "shared", 10_000)))
    shared_gradients = torch.autograd.grad(shared, trained.values())

    assert torch.allclose(shared, plain, rtol=1e-5)
    for name, ours, theirs in zip(trained, shared_gradients, plain_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_padded_separate_rows_have_the_loss_of_single_sequences(base, parts):
    encoder, conversations = parts
    model = base.load_model("float32", "cpu")
    collator = RowCollator(encoder, encoder.pixels)
    together = summed_loss(model, collator([Row((conversation,)) for conversation in conversations]))
    alone = sum(summed_loss(model, collator([Row((conversation,))])) for conversation in conversations)
    plain = sum(plain_loss(model, encoder, conversation) for conversation in conversations)
    assert torch.allclose(together, plain, rtol=1e-5)
    assert torch.allclose(alone, plain, rtol=1e-5)


def test_positions_are_those_of_the_model(base, parts):
    encoder, conversations = parts
    model = base.load_model("float32", "cpu")
    for conversation in conversations:
        theirs, _ = model.model.get_rope_index(
            torch.from_numpy(conversation.ids)[None],
            mm_token_type_ids=torch.from_numpy(conversation.is_image).int()[None],
            image_grid_thw=torch.tensor(conversation.grids),
        )
        assert (rope_positions(conversation, encoder.sizer.merge_size) == theirs[:, 0].numpy()).all()


@pytest.mark.parametrize("base", SHARING, indirect=True)
def test_answers_do_not_see_each_other(base, parts):
    encoder, conversations = parts
    model = base.load_model("float32", "cpu")
    collator = RowCollator(encoder, encoder.pixels)
    first, second, third = conversations[0], conversations[1], conversations[2]
    with_second = collator([Row((first, second))])
    with_third = collator([Row((first, third))])
    length = int(first.scored.sum())
    losses = [
        functional.cross_entropy(
            model(**forward.inputs).logits[tuple(forward.source)][:length], forward.labels[:length]
        )
        for forward in (with_second, with_third)
    ]
    assert torch.allclose(*losses, rtol=1e-5)


def test_labels_are_the_answers_and_nothing_else(parts):
    encoder, conversations = parts
    collator = RowCollator(encoder, encoder.pixels)
    forward = collator(group_rows(conversations[: len(CAPTIONS)], "shared", 10_000))
    assert encoder.processor.tokenizer.decode(forward.labels) == "".join(f"{caption}<|im_end|>" for caption in CAPTIONS)


def test_stored_features_give_the_logits_of_pixels(base, parts, images, image_parameters, tmp_path):
    from qwen_vl_lora.features.encoding import encode_pictures

    encoder, conversations = parts
    store = FeatureStore(tmp_path / "store")
    device = torch.device("cpu")
    store.publish(encode_pictures(images, base, image_parameters, "float32", device, store, tmp_path / "staging"))
    features = store.features(FeatureKey.of(base, image_parameters.size, "float32"))
    model = base.load_model("float32", "cpu")
    rows = group_rows(conversations, "shared", 10_000)
    with torch.no_grad():
        pixels = model(**RowCollator(encoder, encoder.pixels)(rows).inputs).logits
        stored = model(**RowCollator(encoder, StoredPictures(features, base.family))(rows).inputs).logits
    assert torch.allclose(stored, pixels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", SHARING, indirect=True)
def test_a_step_cut_into_passes_has_the_loss_and_gradients_of_one_pass(base, parts):
    encoder, conversations = parts
    model = base.load_model("float32", "cpu")
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    collator = RowCollator(encoder, encoder.pixels)
    results = []
    for batch_size in (len(conversations), 3, 1):
        passes = plan_passes(conversations, "shared", batch_size)
        losses = [summed_loss(model, collator(rows)) for rows in passes]
        results.append((len(passes), sum(losses), torch.autograd.grad(sum(losses), weight)[0]))
    assert results[0][0] < results[1][0] < results[2][0]
    for _, loss, gradient in results[1:]:
        assert torch.allclose(loss, results[0][1], rtol=1e-5)
        assert (gradient - results[0][2]).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize(
    ("base", "kind"),
    [*((family, "separate") for family in FAMILIES), *((family, "shared") for family in SHARING)],
    indirect=["base"],
)
def test_a_turn_that_is_off_is_unscored_in_rows_of_either_kind(base, parts, images, kind):
    encoder, _ = parts
    entry = next(iter(images))
    question = {"from": "user", "value": f"<|vision_start|>{entry.path}<|vision_end|>What?"}
    off = {"from": "assistant", "value": "bad answer", "loss": False}
    records = [
        {
            "id": str(number),
            "conversations": [question, off, {"from": "user", "value": "Again."}, {"from": "assistant", "value": text}],
        }
        for number, text in enumerate(CAPTIONS)
    ]
    conversations = [encoder.encode(conversation) for conversation in Conversations(records)]
    rows = group_rows(conversations, kind, 10_000)
    assert len(rows) == (1 if kind == "shared" else len(CAPTIONS))
    forward = RowCollator(encoder, encoder.pixels)(rows)
    assert encoder.processor.tokenizer.decode(forward.labels) == "".join(f"{caption}<|im_end|>" for caption in CAPTIONS)
    model = base.load_model("float32", "cpu")
    plain = sum(plain_loss(model, encoder, conversation) for conversation in conversations)
    assert torch.allclose(summed_loss(model, forward), plain, rtol=1e-5)
