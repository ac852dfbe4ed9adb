"""Which settings of a training may be others when it goes on: the one list that says so.

ldm/training/going_on.py holds a checkpoint's settings against it, pipelines/dag.py the plan of the stage; so it imports
nothing. A setting that is not named here is what the training is: with another value it is another training.
"""

# More of it goes on with what is there, but for schedules that fall to an end there.
GROWS = ("training.max_steps",)

# How to go on, and from where.
REQUESTS = ("training.accept", "training.resume", "training.skip_samples")

# What decides no weight: what is shown and measured, and when to give up.
SHOWN = (
    "training.log_every_steps",
    "training.grid",
    "training.validate_every_steps",
    "training.validation_samples",
    "training.max_skipped_batches",
)

# Paths of files that count by what they hold.
FILES = ("text_encoder.vocab_file", "text_encoder.weights")

FREE = (*GROWS, *REQUESTS, *SHOWN, *FILES)

# What may change when training.accept names it; `start_from` when that file lies elsewhere now, or is gone.
ACCEPTABLE = tuple(
    f"training.{name}"
    for name in (
        "max_steps", "batch_size", "learning_rate", "lr_schedule", "warmup_steps", "lr_end", "beta1", "beta2",
        "epsilon", "weight_decay", "gradient_clipping", "caption_dropout", "precision", "ema_decay", "deterministic",
        "start_from",
    )
)  # fmt: skip
