"""Every setting of the model half: frozen dataclasses without defaults, so that each value is written in conf/.

They stand together here, away from torch, so that a wrong configuration is refused in a second or two; the code
that a class configures names it.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class CompvisConfig:
    """Sizes of the paper's autoencoders, from high to low resolution: ldm/models/autoencoder.py."""

    channels: int  # of the first level
    channel_mult: list[int]  # channels of each level in multiples of that; each has half the resolution of the last
    num_res_blocks: int  # in each level of the encoder; the decoder has one more
    attention_factors: list[int]  # pixels per position, along a side, of the levels whose blocks end in attention
    middle_attention: bool  # attention between the two blocks of the lowest resolution; false only in vq-f4-noattn
    codes: int | None  # posterior "vq": entries of the codebook


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a small autoencoder of plain convolutions, high to low resolution: ldm/models/tiny_autoencoder.py."""

    image_low: float  # the network's own images lie in [image_low, 1]: -1, or 0 as TAESD has it
    latent_clamp: float | None  # the decoder reads clamp * tanh(z / clamp), 3 in TAESD; null: z as it is
    patch: int  # pixels, along each side, folded into channels at entry and unfolded at exit; 1: none
    encoder_widths: list[int]  # channels of each level
    encoder_blocks: list[int]  # residual blocks of each level
    decoder_widths: list[int]  # channels of each level
    decoder_blocks: list[int]  # residual blocks of each level
    block_convs: int  # 3x3 convolutions in a block, 3 in TAESD
    lowest_norm: bool  # blocks of the lowest level open with a group norm over the whole picture (TAEF2)


@dataclass(frozen=True)
class AutoencoderConfig:
    """An autoencoder's architecture; fields that its kind has no use for are null."""

    kind: str  # "compvis": ldm/models/autoencoder.py; "tiny": ldm/models/tiny_autoencoder.py
    posterior: str  # "kl": moments; "vq": quantised when decoding; "none": deterministic
    factor: int  # pixels per latent, along each side
    latent_channels: int  # channels of z
    compvis: CompvisConfig | None  # kind "compvis"
    tiny: TinyConfig | None  # kind "tiny"


@dataclass(frozen=True)
class AutoencoderSettings:
    """An autoencoder as a run uses it: conf/autoencoder."""

    network: AutoencoderConfig
    weights: str | None  # path of a safetensors file; null: from stage train_autoencoder
    scale_factor: float  # of latents, so that their standard deviation is about 1


@dataclass(frozen=True)
class AutoencoderTrainingConfig:
    """How an autoencoder is trained: ldm/training/train_autoencoder.py."""

    image_size: int  # pixels, of the square pictures trained on; a multiple of 32
    crop_size: int  # pixels, of the pieces cut from them for most of the steps; a multiple of the factor
    whole_share: float  # last share of the steps, on whole pictures
    held_out_share: float  # of the motifs, by hash of the caption
    same_picture: str  # regular expression: captions that differ only in what it matches stand for one motif
    near_duplicate_bits: int  # of 64: a motif that looks this much like a held-out one is not trained on
    batch_size: int  # pictures
    max_steps: int
    warmup_steps: int
    learning_rate: float  # of the convolutions (Muon); falls to zero by a cosine
    bias_learning_rate: float  # of the biases (Adam); likewise
    momentum: float
    ema_decay: float  # of the averaged weights, which are the result
    kl_weight: float  # against the reconstruction loss of ldm/training/autoencoder_loss.py; both are means
    checkpoint_every_steps: int
    log_every_steps: int
    threads: int  # of the processor; results are the same to the bit for equal numbers only
    seed: int


@dataclass(frozen=True)
class ClipTowerConfig:
    """One frozen CLIP text tower: ldm/models/clip.py."""

    width: int  # of the states
    layers: int
    heads: int
    activation: str  # "quick_gelu" in the towers of OpenAI, "gelu" in those of OpenCLIP
    skip_layers: int  # layers at the end that the context leaves out: 0 is the last state, 1 the one before it
    final_norm: bool  # the context goes through the final norm, as in SD 1 and 2 and not in SDXL
    projection: int | None  # width of the pooled output; null: the tower has none
    pad: int  # token id after the end of a caption: 49407 in the towers of OpenAI, 0 in those of OpenCLIP


@dataclass(frozen=True)
class ClipConfig:
    """A whole CLIP, picture and text tower, for scores: ldm/models/clip.py."""

    model: str  # an architecture that open_clip knows by name, or the path of a JSON file that describes one
    weights: str | None  # path of a safetensors file; null: random, for tests


@dataclass(frozen=True)
class TextEncoderConfig:
    """Caption -> tokens (b, length) -> context (b, length, width); fields that its kind has no use for are null."""

    kind: str  # "transformer": trained with the U-Net, ldm/models/text_encoder.py; "clip": frozen, ldm/models/clip.py
    tokenizer: str | None  # "wordpiece", "bytes", "words", "clip": ldm/models/tokenizer.py; null: ready-made tokens
    vocab_file: str | None  # tokenizer "wordpiece": path of its vocabulary, one piece a line
    vocab_sha256: str | None  # what that file must hold
    vocab_size: int  # tokens
    length: int  # tokens of a caption, padded or cut
    width: int  # of the context; with several towers the sum of theirs
    # kind "transformer"
    layers: int | None
    heads: int | None
    head_width: int | None  # heads * head_width need not be width
    canvas: list[int] | None  # c', h, w of what the mean context is drawn on and z_t is joined with; null: none
    # kind "clip"
    towers: dict[str, ClipTowerConfig] | None  # name -> tower; their contexts are joined in this order
    weights: str | None  # path of a safetensors file with the frozen towers; null: random, for tests


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's architecture, in the words of the original configurations; null where a variant has no use for it."""

    in_channels: int  # of z_t and the concatenated condition together
    out_channels: int  # of the prediction; classes, in a classifier
    model_channels: int  # of the first level
    channel_mult: list[int]  # channels of each level as a multiple of model_channels; each level halves the sides
    num_res_blocks: int  # in each level on the way down; one more on the way up
    attention_resolutions: list[int]  # down-factors (not sides) of the levels that attend; the middle always does
    num_heads: int | None  # heads of every attention; null: by num_head_channels
    num_head_channels: int | None  # channels of a head; null: by num_heads
    transformer_depth: list[int] | None  # of each level, the middle as the last; null: AttentionBlocks instead
    context_dim: int | None  # width of the context; null: none is read
    cross_only_resolutions: list[int]  # down-factors whose transformers have no self-attention (x4 upscaler)
    linear_projections: bool  # into and out of transformers: linear (SD 2, SDXL) or convolutions, the same numbers
    qkv_order: str  # AttentionBlock's channels: "head_first" (head, qkv, c), as released, or "qkv_first" (qkv, head, c)
    scale_shift_norm: bool  # the timestep scales and shifts the second norm of a ResBlock, instead of being added
    resblock_updown: bool  # levels are joined by ResBlocks, instead of by single convolutions
    num_classes: int | None  # labels that are added to the timestep embedding
    vector_dim: int | None  # width of the vector that is added to the timestep embedding (SDXL)
    norm_groups: int  # groups of every group norm
    dropout: float  # inside ResBlocks


@dataclass(frozen=True)
class ClassEmbedderConfig:
    """Class label -> one context token."""

    classes: int  # including the null class, where there is one
    width: int  # of the context


@dataclass(frozen=True)
class SpatialRescalerConfig:
    """Picture-like condition -> concatenated condition at the latents' size."""

    stages: int  # times that it is resized
    method: str  # "nearest", "linear", "bilinear", "trilinear", "bicubic" or "area", of torch's interpolate
    multiplier: float  # of the sides in each stage
    in_channels: int  # of the condition
    out_channels: int | None  # of a 1x1 convolution after the last stage; null: none
    bias: bool  # of that convolution


@dataclass(frozen=True)
class GenerationConfig:
    """Which pictures are drawn from a checkpoint, and how: ldm/generate.py."""

    prompts: list[str] | None  # null: the caption of every sample that was trained on, which `evaluate` needs
    unseen_prompts: list[str]  # drawn besides; the grid labels those that no training sample has as its caption
    sampler: str  # "ddim" and the other names of ldm/diffusion/sampler.py
    steps: int  # of the sampler
    spacing: str  # its timesteps: "trailing", from the noisiest on, and the other names of ldm/diffusion/grid.py
    guidance_scale: float  # 1 is without guidance
    eta: float  # 0 is deterministic DDIM
    seed: int  # with the prompt's place in the list it decides the starting noise
    batch_size: int  # pictures drawn at once; guidance doubles what goes through the denoiser
    grid_pictures: int  # of the training captions, spread evenly over them, that grid.png shows


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of generated pictures: ldm/evaluation."""

    shuffle_seed: int  # deals the captions out anew for the control
    pairs: int  # prompts, spread evenly, that pairs.png shows beside their training picture


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule and what the network is asked for: ldm/diffusion."""

    timesteps: int  # T
    schedule: str  # "sqrt_linear" (CompVis "linear", diffusers "scaled_linear"), "linear", "sqrt", "cosine" or "flow"
    beta_start: float | None  # first beta; null where the schedule has none
    beta_end: float | None  # last beta; null where the schedule has none
    zero_terminal_snr: bool  # no signal at all at the last timestep (needs prediction v or z0)
    prediction: str  # "eps", "v", "z0" or "flow"
    loss: str  # "l2" or "l1"
    min_snr_gamma: float | None  # cap of the signal-to-noise weight, of loss l2; null: every timestep counts the same.
    # With flow or zero_terminal_snr the last timestep is pure noise and weighs nothing: where generation begins there
    # (spacing "trailing") the network was taught on its neighbours alone
    offset_noise: float  # share of noise that is constant over a picture, 0 in the paper


@dataclass(frozen=True)
class SampleGridConfig:
    """The pictures that are drawn while training: ldm/training/train.py."""

    every_steps: int | None  # null: none are drawn
    prompts: list[str]  # one picture each, always from the same noise
    steps: int  # of the sampler
    guidance_scale: float


@dataclass(frozen=True)
class TrainingConfig:
    """What is learned from, and how fast: ldm/training/train.py."""

    seed: int  # decides weights, order, noise, timesteps and dropped captions
    start_from: str | None  # path of an ema.safetensors whose weights a new run begins with; null: random weights
    resume: str | None  # "step-N": back to that checkpoint, later ones are set aside; null: on from the newest
    skip_samples: list[int] | None  # [a, b]: samples a to b - 1 of the order are not trained on; null: all are
    accept: list[str] | None  # keys, as training.learning_rate, that a run that goes on may have changed; null: none
    max_steps: int  # updates of the weights
    batch_size: int  # samples of one update, over all processes
    learning_rate: float  # at its highest
    lr_schedule: str  # "constant", "cosine" or "inverse_sqrt": ldm/training/lr.py
    warmup_steps: int  # over which the learning rate rises from 0
    lr_end: float  # share of learning_rate that is left at max_steps, where the schedule falls to an end
    beta1: float  # AdamW
    beta2: float  # AdamW
    epsilon: float  # AdamW
    weight_decay: float  # AdamW
    gradient_clipping: float | None  # highest norm of the gradient; null: any
    caption_dropout: float  # share of captions that become the empty one, which guidance needs
    precision: str  # "float32"; "bf16_autocast": weights float32, arithmetic bf16; "bf16" and "fp16": weights too, with
    # float32 masters; fp16 also with a loss scale that follows its overflows
    deterministic: bool  # on CUDA: equal runs give equal bits, at some cost; on the processor they always do
    ema_decay: float  # of the averaged weights, which pictures are drawn from; warmed up as (1 + n) / (10 + n)
    ema_of: str  # "unet" or "all": what is averaged; the rest goes with its newest weights
    lanes: int  # streams that the order of samples is dealt to; world sizes that divide it share out what is read
    window_shards: int  # shards of a lane that are shuffled together
    held_out_shards: int  # shards that are not trained on; their loss is measured instead
    validate_every_steps: int | None  # null: never
    validation_samples: int  # held-out samples, always the same with the same noise
    log_every_steps: int
    max_skipped_batches: int  # whose loss or gradient is no number: so many are left out, the next one ends the run
    grid: SampleGridConfig


@dataclass(frozen=True)
class TrainingRunConfig:
    """How a training run is carried out; what is learned differs by rounding at most."""

    threads: int  # processor threads of each process
    micro_batch_size: int  # samples of one forward pass of one process
    zero_stage: int  # DeepSpeed ZeRO stage, 0 to 3: what is shared out among the processes
    loader_workers: int  # threads of each process that read ahead; 0 reads when a batch is needed
    loader_cache_bytes: int  # samples that each process keeps in memory once they are read
    activation_checkpointing: bool  # blocks are computed again for the backward pass, for memory
    compile: bool  # torch.compile: minutes at the start, quicker steps after
    checkpoint_every_steps: int
    checkpoint_every_seconds: float | None  # also where the last one was begun so long ago; null: by steps alone
    keep_checkpoints: int  # newest ones that stay
    keep_every_steps: int | None  # checkpoints at multiples of this stay too; null: none
    keep_best: bool  # the checkpoint with the lowest validation loss stays too; the loss is that of the weights
    # as they are trained, which their average follows
    copy_to: str | None  # folder or s3://bucket/prefix to which each checkpoint is copied as well, in the background,
    # below <name>/train; a training that finds none on its disk goes on from there. null: none
    hang_seconds: float | None  # a step, save or grid that takes longer ends the process, with stacks; a part of its
    # start half an hour at least. null: never
    deepspeed: dict[str, object]  # further keys of DeepSpeed's configuration, passed through


@dataclass(frozen=True)
class TrainSettings:
    """What a model is and how it is taught: all that ldm/training/train.py is told but for its data and its machine."""

    unet: UNetConfig
    text_encoder: TextEncoderConfig | None
    diffusion: DiffusionConfig
    training: TrainingConfig


def from_plain(kind: Any, value: Any) -> Any:
    """Settings from what dataclasses.asdict made of them, as a checkpoint's config.json keeps them."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
        return None if value is None else from_plain(inner[0], value)
    if typing.get_origin(kind) is dict:
        return {key: from_plain(typing.get_args(kind)[1], item) for key, item in value.items()}
    if not is_dataclass(kind):
        return value
    hints = typing.get_type_hints(kind)
    # What may be null may also be absent: an older file does not know of it.
    known = {field.name: value[field.name] for field in fields(kind)
             if field.name in value or types.NoneType not in typing.get_args(hints[field.name])}  # fmt: skip
    return kind(**{field.name: from_plain(hints[field.name], known.get(field.name)) for field in fields(kind)})
