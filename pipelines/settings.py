"""Settings of the data half and of the machines. No values here: those live in conf/."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config import TrainingRunConfig
from ldm.node_cache import NodeCache


# ---- what: conf/dataset ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SourceConfig:
    """Where the metadata lies and what its columns are called."""

    metadata: str | None  # path or glob of files, s3://bucket/prefix/*.parquet too; null: the embedded web's own
    format: str  # of the files: parquet; or tsv, tab-separated without a header, with columns column0, column1, ...
    columns: dict[str, str | None]  # our name (url, caption, width, height, scores) -> name in the files; null: none


@dataclass(frozen=True)
class SampleWebConfig:
    """The embedded web: captioned pictures on loopback, most of whose rows fall, as they do on the real web."""

    rows: int  # of the metadata
    pictures: int  # distinct good pictures, those that survive every stage and the selection
    seed: int  # of the plan: which drawings, sizes, scores and failures


@dataclass(frozen=True)
class FilterMetadataConfig:
    """Which rows are worth a request. Applied in this order; each dropped row has one reason."""

    shard_samples: int  # rows of a shard
    deny_lists: dict[str, str]  # column, url_md5 or url_sha256 -> text file of what must not come in
    deny_domains: list[str]  # hosts, and all hosts below them, that are not asked
    allow_domains: list[str]  # the only hosts that are asked; empty: all
    deny_urls: list[str]  # regular expressions (RE2), found anywhere in the URL
    allow_urls: list[str]  # one of them must be found; empty: none need be
    min_size: int  # pixels of the shorter side
    max_aspect: float  # longer side over shorter side
    bounds: dict[str, list[float | None]]  # score -> [lowest, highest] that is kept; null is no bound
    one_of: dict[str, list[str]]  # column (language, nsfw, license) -> values that are kept
    min_caption_chars: int
    min_caption_words: int
    max_caption_chars: int | None
    deduplicate: list[str]  # what no two rows of the whole set may share: url_caption, url


@dataclass(frozen=True)
class DownloadConfig:
    """How URLs become pictures. threads, requests_per_second, min_yield and yield_after decide none, and may change."""

    image_size: int  # pixels of the shorter side; larger pictures are made smaller, smaller ones stay
    encode_format: str  # of what is stored: jpg, or png, which is exact and several times larger
    encode_quality: int  # of jpg, 1 to 95
    max_pixels: int  # of a picture before decoding
    max_bytes: int  # of a body; all in a worker take four times as much at most, beside the first 512 KiB of each
    deadline_seconds: float  # for all that one URL may cost, retries and redirects included
    retries: int
    backoff_seconds: float  # before the first retry; doubles
    max_redirects: int
    threads: int  # requests under way for one shard; hosts that answer slowly want many
    user_agent: str
    respect_robots: bool  # robots.txt and opt-out headers
    requests_per_second: float | None  # for each host, by all workers of a cluster together; null is no budget
    min_yield: float  # share of URLs that give a picture below which something is broken: the stage stops
    yield_after: int  # URLs from which that share is asked for, long before a shard's last one; a worker
    # judges smaller shards together. URLs that failed in an earlier edition and are tried again are not judged


@dataclass(frozen=True)
class ClipScoreConfig:
    """The CLIP whose embeddings are scored: how well a picture fits its caption, and what the heads below say of it."""

    model: str  # an architecture that open_clip knows, ViT-L-14 say
    weights: str  # safetensors file of both towers, as open_clip names them
    sha256: str | None  # of that file; null is refused with the command that computes it
    batch_size: int  # pictures in one call, padded; other sizes give other last digits
    keep_embeddings: bool  # stores them too, as fp16: 1.5 kB a picture for 768 numbers


@dataclass(frozen=True)
class ScoreHeadConfig:
    """A small network on CLIP's embedding of a picture, such as LAION's aesthetic predictor or its NSFW detector."""

    weights: str  # file of its layers, as LAION released them or in safetensors: ldm/models/score_head.py
    sha256: str | None  # of that file; null is refused with the command that computes it
    activation: str  # between layers: none (LAION's aesthetic heads) or relu (its NSFW detector)
    output: str  # what becomes of the last number: none or sigmoid


@dataclass(frozen=True)
class FilterImagesConfig:
    """What is looked at in every picture. Only the first two drop one for good; all scores wait for the selection."""

    min_size: int  # pixels of the shorter side as downloaded
    max_aspect: float  # longer side over shorter side
    clip: ClipScoreConfig | None  # null: no scores but the hash of the looks
    heads: dict[str, ScoreHeadConfig]  # score (aesthetic, nsfw) -> its head; needs clip


@dataclass(frozen=True)
class BucketsConfig:
    """Shapes of about the area of the square, for pictures that are not square."""

    max_aspect: float  # longer side over shorter side of the longest shape
    step: int  # pixels; every side is a multiple of it, and it of the autoencoder's factor


@dataclass(frozen=True)
class PrecomputeLatentsConfig:
    resolution: int  # pixels of the square that is encoded and trained on
    more_resolutions: list[int]  # further ones from the same decoded pictures, each in a folder of its own
    buckets: BucketsConfig | None  # null: squares, cut from the middle
    flip: bool  # mirrored pictures are encoded too; training takes either, one as often as the other
    batch_size: int  # images in one encoder call, padded; other sizes give other bytes
    precision: str  # of the autoencoder's arithmetic: float32, bf16 or fp16; what is stored is fp16 always
    threads: int  # processor threads of one encoder; other counts give other bytes
    channels_last: bool  # memory format of the encoder; another one gives other bytes
    check_samples: int  # samples of each shard that are decoded back
    min_psnr: float  # dB; mean of the decoded-back samples of a shard
    text_features: bool  # what a frozen text encoder makes of each caption is cached too, and training reads that


@dataclass(frozen=True)
class SelectionConfig:
    """Which of the encoded samples are used. Changing it downloads and encodes nothing."""

    thresholds: dict[str, list[float | None]]  # score -> [lowest, highest] that is used; null is no bound
    exact_duplicates: bool  # pictures whose stored bytes are equal are one picture
    near_duplicate_bits: int | None  # perceptual hashes that differ in at most so many of 64 bits are one picture
    held_out_near_duplicate_bits: int | None  # held-out samples this near to one that is trained on are left out
    top_score: str | None  # score by which the best are taken
    top_percent: float | None  # per cent of samples that are taken
    removed: str | None  # a text file of keys, URLs and hashes (of files as they came or are stored) not to be used


# ---- how ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Resources:
    """What one worker of a stage takes, and how many shards of it are under way at once."""

    num_cpus: float
    num_gpus: float
    in_flight: int  # shards, or 1 for a stage that makes one result


@dataclass(frozen=True)
class TableResources:
    """What tables over the whole set take on the driver: filter_metadata's, and those of the selection that `train`
    begins with. What does not fit into memory goes to disk."""

    threads: int
    memory_bytes: int  # of DuckDB; the process takes about half a gigabyte more


@dataclass(frozen=True)
class GpuConfig:
    """The GPU, or the core of a processor, that each worker of training has: for `python -m pipelines.plan`, and for
    the share of its peak that is reached."""

    name: str
    memory_bytes: float  # for each worker
    peak_flops: float  # dense products in a second, of bf16 on a GPU
    mfu: float  # share of that which a plan reckons with
    price_per_hour: float  # US dollars


@dataclass(frozen=True)
class TrainResources:
    workers: int  # processes, one for each GPU
    num_cpus: float  # for each worker
    num_gpus: float  # for each worker; 0 trains on the processor
    max_failures: int  # restarts of the worker group before the stage fails
    gpu: GpuConfig | None  # null: nobody knows, and plan cannot say what training costs
    run: TrainingRunConfig


@dataclass(frozen=True)
class ClusterConfig:
    address: str  # "local" starts Ray here; "auto" or an address joins a cluster
    num_cpus: int | None  # processors that a local Ray may count on; null counts them
    object_store_bytes: int | None  # shared memory of a local Ray; null is Ray's own choice
    filter_metadata: TableResources
    download: Resources
    filter_images: Resources
    precompute_latents: Resources
    train: TrainResources
    whole: Resources  # generate, evaluate and train_autoencoder
    whole_threads: int  # processor threads of those three
    max_quarantined_shards: int  # of a stage, that may keep failing before it fails; they are left out, see status
    cache: NodeCache  # of every node; used where paths.shards is on an object store


@dataclass(frozen=True)
class PathsConfig:
    outputs: str  # folder of all runs, which all nodes share
    shards: str | None  # where filter_metadata to precompute_latents write: another folder or s3://bucket/prefix; null:
    # outputs. The names below it are the same: <name>/<stage>
    reuse: dict[str, str]  # stage -> name of another run whose finished stage is read instead
    sources: dict[str, str]  # setting that names a file -> where the file comes from, for whoever does not have it


@dataclass(frozen=True)
class TrackingConfig:
    enabled: bool  # false only keeps the journal; `python -m pipelines.sync` sends it later
    uri: str | None  # MLflow server or database; null is a sqlite file beside the runs, <outputs>/mlflow.db
    experiment: str  # name under which MLflow groups the runs
    interval_seconds: float  # pause between two looks at the journal
    flush_seconds: float  # how long the end of a run waits for what has not been sent
