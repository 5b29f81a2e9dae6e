"""Names of transformers' TrainingArguments that are refused: why, and what to write instead.

The names that are allowed are the fields of `library_parameters.TrainingParameters`.
"""

from __future__ import annotations

_ONE_LOSS = "validation measures the loss alone"
_OWN_LOADER = "set by the project: reading stored features is faster than passing them on from a worker"
_OWN_UPLOAD = "set by the project: the adapter stays in the catalog; upload the directory yourself"
_OWN_LOGGING = "set by the project: log levels are those of Kedro's logging configuration (KEDRO_LOGGING_CONFIG)"
_NOT_COMPILED = "not supported: results and exact resume were never checked on compiled models; remove it"
_NO_OTHER_KERNELS = "not supported: results were never checked with other kernels; remove it"
_USE_TRACKER = "use `trackers` of parameters.yml"

REFUSED_TRAINING_NAMES = {
    "output_dir": "set by the project: checkpoints are in the recipe's workspace",
    **dict.fromkeys(
        ("report_to", "run_name", "project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
        f"set by the project: {_USE_TRACKER}",
    ),
    "use_cpu": "set by the project: use `device`",
    "resume_from_checkpoint": "set by the project: use `resume`",
    "auto_find_batch_size": "set by the project: use per_device_train_batch_size: auto",
    "remove_unused_columns": "set by the project: batches are built by its own collator",
    "label_names": "set by the project: batches are built by its own collator",
    "length_column_name": "set by the project: lengths are counted in tokens, and rows of one step are sorted by them",
    "train_sampling_strategy": "set by the project: rows of one step are sorted by length without changing the step",
    "dataloader_drop_last": "set by the project: the last, smaller step of an epoch is trained",
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_pin_memory",
            "dataloader_in_order",
            "dataloader_multiprocessing_context",
        ),
        _OWN_LOADER,
    ),
    "ignore_data_skip": "set by the project: a resumed run continues at its exact sample",
    "label_smoothing_factor": "set by the project: the loss is the plain mean over answer tokens",
    "average_tokens_across_devices": "set by the project: the loss is the mean over the answer tokens of all processes",
    "neftune_noise_alpha": "set by the project: noise on embeddings is not part of a reproducible row",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_model_id",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        _OWN_UPLOAD,
    ),
    "do_train": "set by the project: run the training pipeline",
    "do_eval": "set by the project: use eval_strategy",
    "do_predict": "set by the project: run the evaluation pipeline",
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "batch_eval_metrics",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "include_for_metrics",
        ),
        f"set by the project: {_ONE_LOSS}",
    ),
    "greater_is_better": f"set by the project: {_ONE_LOSS}, and its lowest value is the best",
    "eval_on_start": "not supported: no checkpoint belongs to the loss before training; remove it",
    "eval_delay": "not supported: validation begins with the first epoch or after eval_steps; remove it",
    "bf16_full_eval": "set by the project: validation computes in the precision of training; use bf16",
    "fp16_full_eval": "set by the project: validation computes in the precision of training; use fp16",
    "tf32": "not supported: results were never checked with it; use bf16: true, which is even faster",
    "full_determinism": "not supported: on a CPU all runs repeat exactly, and on a GPU it was never checked; remove it",
    "local_rank": "set by the project: use `cluster`",
    "ddp_timeout": "set by the project: use cluster.timeout",
    "ddp_backend": "set by the project: NCCL on GPUs, gloo on CPUs",
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_static_graph"),
        "set by the project: it follows from `vision`; remove it",
    ),
    "accelerator_config": "set by the project: its own loader shares the captions of a step among processes",
    "parallelism_config": "not supported: use `cluster` for several processes, and fsdp to share weights among them",
    "deepspeed": (
        "set by the project: a step is several passes here, and its engine "
        "would update the weights after each; use fsdp"
    ),
    "fsdp_config": (
        "set by the project: fsdp: true shards each layer of the language model; other ways were never tested here"
    ),
    "data_seed": "set by the project: use seed",
    "activation_checkpointing": "set by the project: use gradient_checkpointing: true",
    "gradient_checkpointing_kwargs": "set by the project: use gradient_checkpointing: true",
    "activation_checkpointing_kwargs": "set by the project: use gradient_checkpointing: true",
    "torch_empty_cache_steps": "set by the project: its own training step never empties the cache",
    "use_cache": "set by the project: training keeps no cache of keys and values",
    "restore_callback_states_from_checkpoint": (
        "set by the project: a resumed run restores the counts of its callbacks"
    ),
    "save_only_model": "set by the project: a checkpoint without optimizer state cannot be resumed",
    "save_on_each_node": "set by the project: all machines share one workspace, so a checkpoint is written once",
    "enable_jit_checkpoint": "set by the project: SIGTERM and Ctrl-C save a checkpoint after the step",
    "optim_args": "not supported: the optimizers that are allowed take theirs by name, such as adam_beta2; remove it",
    "optim_target_modules": "not supported: its optimizers project whole weights, and an adapter has small ones",
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node", "debug"), _OWN_LOGGING),
    "disable_tqdm": "set by the project: a terminal shows a progress bar, and a log file shows lines",
    "logging_nan_inf_filter": "set by the project: a loss that is not finite stops the training",
    "include_num_input_tokens_seen": "set by the project: training_summary counts samples; see `qwen-vl-lora plan`",
    "skip_memory_metrics": "set by the project: training_summary holds the peak memory",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _NOT_COMPILED),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _NO_OTHER_KERNELS),
}
"""Names of the installed TrainingArguments that are not allowed."""

_USE_DEVICE = "use `device`: auto, cpu or cuda"
_USE_PRECISION = "use bf16: true or fp16: true"
_USE_PROCESSOR = "the processor is that of the base model"
REMOVED_TRAINING_NAMES = {
    "warmup_ratio": "use warmup_steps with a share below 1, such as warmup_steps: 0.05",
    "evaluation_strategy": "use eval_strategy",
    "evaluate_during_training": "use eval_strategy: steps",
    "group_by_length": "remove it: rows of one step are sorted by length without changing the step",
    "overwrite_output_dir": "remove it: every run writes a new version of the adapter. See `resume`",
    **dict.fromkeys(("no_cuda", "use_mps_device", "use_ipex", "xpu_backend"), _USE_DEVICE),
    **dict.fromkeys(("tpu_num_cores", "tpu_metrics_debug"), _USE_DEVICE),
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    **dict.fromkeys(("half_precision_backend", "fp16_backend", "fp16_opt_level"), _USE_PRECISION),
    "logging_dir": f"remove it: {_USE_TRACKER}",
    "save_safetensors": "remove it: adapters are always written as safetensors",
    "adafactor": "use optim: adafactor",
    **dict.fromkeys(("sharded_ddp", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"), "use fsdp: true"),
    **dict.fromkeys(("dispatch_batches", "split_batches", "mp_parameters"), "use `cluster` for several processes"),
    **dict.fromkeys(
        ("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
        "remove it: the adapter stays in the catalog; upload the directory yourself",
    ),
    **dict.fromkeys(("include_inputs_for_metrics", "past_index", "predict_with_generate"), f"remove it: {_ONE_LOSS}"),
    "include_tokens_per_second": "remove it: training_log holds samples_per_second",
    **dict.fromkeys(("torchdynamo", "jit_mode_eval"), "remove it: models are not compiled here"),
    "ray_scope": "remove it: hyperparameters are not searched here",
    **dict.fromkeys(("tokenizer", "processing_class"), _USE_PROCESSOR),
    "data_collator": "remove it: batches are built by the project's own collator",
    **dict.fromkeys(("max_seq_length", "max_length"), "use the top-level key max_length"),
    "packing": "remove it: use `rows`",
}
"""Names of transformers 4, of its Trainer and of trainers built on it."""
