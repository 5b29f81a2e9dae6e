"""Equal texts are found in 16 bytes a text."""

from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.samples.digests import Digests


@given(st.lists(st.text(max_size=2), max_size=40))
def test_first_places_and_numbers_are_those_of_the_texts_themselves(texts):
    digests = Digests()
    for text in texts:
        digests.add(text)
    assert digests.first_places().tolist() == [texts.index(text) for text in texts]
    assert (len(digests), digests.num_different) == (len(texts), len(set(texts)))
