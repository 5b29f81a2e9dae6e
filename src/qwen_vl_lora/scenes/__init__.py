"""Pictures and captions of the embedded default, and the tiny base model that is pre-trained on them."""
