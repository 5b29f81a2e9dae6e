"""The memory check bounds its time on large data, and still sees the largest pass."""

from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.training.plan import longest
from samples.pictures import PARAMETERS
from tiny_models import captioned


def test_the_memory_check_takes_the_longest_texts_and_at_least_a_whole_step():
    records = [captioned(str(number), "a.png", "x" * number) for number in range(600)]
    settings = validate_parameters(PARAMETERS)
    assert {record["id"] for record in longest(records, settings)} == {str(number) for number in range(344, 600)}
    step = {"per_device_train_batch_size": 100, "gradient_accumulation_steps": 5}
    large = settings.model_copy(update={"training_args": settings.training_args.model_copy(update=step)})
    assert len(longest(records, large)) == 500
    assert longest(records[:3], large) == records[2::-1]
