"""The tutorials' method, written afresh for today's transformers: mapping, training, prediction.

Each function says which step of the tutorials it is and where it had to differ. Differences are of
three kinds only: today's libraries would refuse the old form; both sides must see the same tokens
for losses to be comparable; settings come from the shared parameters instead of being written in.
What the method wastes is left as it is: that is what is measured.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from qwen_vl_utils import process_vision_info
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.jobs import Job
from datasets import Dataset

MARKERS = ("<|vision_start|>", "<|vision_end|>")
FIRST_LOSS_SAMPLES = 16

_mapped: dict[Path, Dataset] = {}
"""By scratch folder, what `train` mapped: `check` follows in the same process and need not map it again."""


class RowMapper:
    """Tutorial step "process_func": one conversation to one row of the Arrow dataset.

    As there: picture through `process_vision_info` at a fixed size, chat template, processor, prompt
    ids and answer ids joined, -100 on the prompt, tensors to lists and back, truncation at the end.
    """

    def __init__(self, processor: Any, parameters: dict[str, Any]) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.size = {name: parameters["image"][name] for name in ("resized_height", "resized_width")}
        self.max_length = parameters["max_length"]
        self.generation = {name: parameters["generation"][name] for name in ("max_new_tokens", "repetition_penalty")}

    def messages(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        """The question as the chat template wants it. The tutorials, too, put the picture before the text."""
        question = example["conversations"][0]["value"]
        text, _, rest = question.partition(MARKERS[0])
        content = [
            {"type": "image", "image": rest.partition(MARKERS[1])[0], **self.size},
            {"type": "text", "text": text.strip()},
        ]
        return [{"role": "user", "content": content}]

    def ask(self, messages: list[dict[str, Any]]) -> Any:
        """Processor output (tensors) for one question."""
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images, videos = process_vision_info(messages)
        return self.processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Differs from the tutorials in two ways.

        The answer ends with the chat format's end token, as in this project, not with the pad token.
        `mm_token_type_ids`, which today's processor adds, is left out of the row, since
        DataCollatorForSeq2Seq cannot pad it; `PaddedRows` computes it again.
        """
        prompt = {key: value.tolist() for key, value in self.ask(self.messages(example)).items()}
        response = self.tokenizer(example["conversations"][1]["value"], add_special_tokens=False)
        answer = [*response["input_ids"], self.tokenizer.eos_token_id]
        input_ids = prompt["input_ids"][0] + answer
        attention_mask = prompt["attention_mask"][0] + [1] * len(answer)
        labels = [-100] * len(prompt["input_ids"][0]) + answer
        return {
            "input_ids": input_ids[: self.max_length],
            "attention_mask": attention_mask[: self.max_length],
            "labels": labels[: self.max_length],
            "pixel_values": torch.tensor(prompt["pixel_values"]),
            "image_grid_thw": torch.tensor(prompt["image_grid_thw"]).squeeze(0),
        }


class PaddedRows:
    """Tutorial step "DataCollatorForSeq2Seq(padding=True)".

    Differs: adds `mm_token_type_ids`, without which today's model refuses pictures. It is 1 on
    image tokens, so it follows from the padded ids.
    """

    def __init__(self, processor: Any) -> None:
        self._pad = DataCollatorForSeq2Seq(tokenizer=processor.tokenizer, padding=True)
        self._image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self._pad(rows)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self._image_token).long()
        return batch


def load_base(job: Job) -> Any:
    """Tutorial step "load the model". Differs: the class is found from the config, and dtype and device are given."""
    arguments = job.parameters["training_args"]
    dtype = torch.bfloat16 if arguments["bf16"] else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(job.base_path, dtype=dtype)
    return model.to(job.parameters["device"])


def map_rows(job: Job, mapper: RowMapper) -> Dataset:
    """Tutorial step "Dataset.from_json(...).map(process_func)"; the cache folder is set by the bench, and empty."""
    dataset = Dataset.from_json(str(job.data / "train.json"))
    return dataset.map(mapper, remove_columns=["id", "conversations"])


def add_lora(model: Any, parameters: dict[str, Any]) -> PeftModel:
    """Tutorial step "LoraConfig, get_peft_model".

    Differs: the seed is set first, and the vision tower is excluded by name. On Qwen2-VL that changes
    nothing; on Qwen2.5-VL the tutorials' list would adapt the tower, and the work would not be equal.
    """
    set_seed(parameters["training_args"]["seed"])
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, inference_mode=False, exclude_modules=r"(.*\.)?visual\..*", **parameters["lora"]
    )
    return get_peft_model(model, config)


def training_arguments(parameters: dict[str, Any], output_dir: Path) -> TrainingArguments:
    """Tutorial step "TrainingArguments", with the tutorials' keys. Differs: a seed is given."""
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "logging_first_step",
        "num_train_epochs",
        "save_steps",
        "learning_rate",
        "gradient_checkpointing",
        "bf16",
        "seed",
    )
    given = {name: parameters["training_args"][name] for name in names}
    return TrainingArguments(
        **given,
        output_dir=str(output_dir),
        report_to="none",
        disable_tqdm=True,
        use_cpu=parameters["device"] == "cpu",
    )


def train(job: Job) -> dict[str, Any]:
    """The tutorials' training script from the JSON of conversations to the last checkpoint.

    `enable_input_require_grads` is called whatever the checkpointing, as the script does. Today it
    hooks the vision tower's input as well, which sends the backward pass through the frozen tower.
    """
    parameters = job.parameters
    processor = AutoProcessor.from_pretrained(job.base_path)
    model = load_base(job)
    model.enable_input_require_grads()
    rows = _mapped[job.scratch] = map_rows(job, RowMapper(processor, parameters))
    trainer = Trainer(
        model=add_lora(model, parameters),
        args=training_arguments(parameters, job.scratch / "output"),
        train_dataset=rows,
        data_collator=PaddedRows(processor),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    # The tutorials write checkpoint-62 by hand; it is the last one.
    adapter = max((job.scratch / "output").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {"train_s": round(seconds, 3), "steps": trainer.state.global_step, "adapter": str(adapter)}


def caption(job: Job) -> dict[str, Any]:
    """The tutorials' prediction: the model is loaded for the base and again for the adapter, one picture at a time."""
    processor = AutoProcessor.from_pretrained(job.base_path)
    mapper = RowMapper(processor, job.parameters)
    examples = job.conversations("test")
    base_model = load_base(job)
    base = [_predict(base_model, mapper, example) for example in examples]
    tuned_model = PeftModel.from_pretrained(load_base(job), model_id=job.options["adapter"])
    tuned = [_predict(tuned_model, mapper, example) for example in examples]
    return {"base_captions": base, "tuned_captions": tuned}


def _predict(model: Any, mapper: RowMapper, example: dict[str, Any]) -> str:
    """Tutorial step "predict". Differs: greedy decoding and the penalty are stated, as on the other side."""
    inputs = mapper.ask(mapper.messages(example)).to(model.device)
    ids = model.generate(**inputs, do_sample=False, **mapper.generation)
    trimmed = [out[len(asked) :] for asked, out in zip(inputs.input_ids, ids, strict=True)]
    return mapper.processor.batch_decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]


def check(job: Job) -> dict[str, Any]:
    """What must be equal on both sides: image tokens of the whole training set, and the untrained loss."""
    processor = AutoProcessor.from_pretrained(job.base_path)
    rows = _mapped[job.scratch]
    texts = rows.select_columns(["input_ids", "labels"])
    first = rows.select(range(min(FIRST_LOSS_SAMPLES, len(rows))))
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return {
        "tokens": sum(len(row["input_ids"]) for row in texts),
        "image_tokens": sum(row["input_ids"].count(image_token) for row in texts),
        "scored_tokens": sum(label != -100 for row in texts for label in row["labels"]),
        "first_loss": mean_loss(load_base(job).eval(), PaddedRows(processor), list(first)),
    }


@torch.no_grad()
def mean_loss(model: Any, collate: PaddedRows, rows: list[dict[str, Any]]) -> float:
    """Mean loss over all answer tokens, each row by itself and from its pixels: the plain way, for any adapter."""
    total, tokens = 0.0, 0
    for row in rows:
        # Arrow gives lists back, and those the collator expects.
        plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
        batch = collate([plain]).to(model.device)
        scored = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * scored
        tokens += scored
    return total / tokens
