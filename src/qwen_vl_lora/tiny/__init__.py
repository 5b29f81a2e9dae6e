"""Pictures and captions of the default recipe, and the tiny base model that is pre-trained on such pictures."""
