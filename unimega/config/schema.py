"""What a run is, key by key: one frozen dataclass per section of a run file. Derived values are functions in ``rules``.

A field without a default must be given. ``None`` means "not given"; the docstring says what then holds.
Paths are relative to the working directory.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Init:
    """Standard deviations of the normal distributions that weights are drawn from."""

    embedding: float = 0.02
    """Rows of the embedding."""
    linear: float = 0.02
    """Linears; attention-out and FFN-down take linear / sqrt(2 num_layers)."""
    head: float = 0.02
    """Rows of the head, when it is not tied."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank factors beside the weights of linears: y = x W^T + alpha / rank * dropout(x) A^T B^T."""

    rank: int = 0
    """Rows of A and columns of B, per projection; 0: no factors, and no other key here."""
    alpha: float = 16.0
    """Their product counts alpha / rank times."""
    dropout: float = 0.0
    """Share of the values of x that A does not see, in training."""
    match: tuple[str, ...] = ("*",)
    """Patterns of the names of linears that have factors, e.g. *.attention.*, *.experts.*."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture and its sizes."""

    preset: str
    """Which stack of layers: dense, unix, share, moe_hard, mot, moe or unimoe."""
    hf_config: str = ""
    """A Hugging Face config.json or its folder (Qwen2, Qwen3, Llama, Qwen3-MoE, Mixtral): sizes, norms, biases, rope,
    experts. Keys given here win."""
    num_layers: int
    """Layers of the stack."""
    width: int
    """Model width D."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; divides heads."""
    head_width: int
    """Width of a head; even, heads * head_width may differ from width."""
    ffn_width: int
    """Hidden width of the SwiGLU FFN."""
    vision_ffn_width: int | None = None
    """share (middle layers), mot: FFN width of vision tokens. Absent: ffn_width. 0 is legal beside a shared FFN."""
    shared_ffn_width: int | None = None
    """share: width of the FFN that every token of a middle layer passes beside its modality's own."""
    split_every: int | None = None
    """moe_hard: every k-th layer has an FFN per modality."""
    output_projection: Literal["split", "shared"] | None = None
    """mot: attention output projection per modality or one for all, as in the original. Absent: split."""
    unused_output: bool = False
    """mot, output_projection = shared: carry the frozen vision projection that the original never uses."""
    experts: int | None = None
    """moe, unimoe: routed experts of a sparse layer, E. Absent in unimoe: 8."""
    expert_width: int | None = None
    """moe, unimoe: FFN width of each expert. Absent: ffn_width."""
    top_k: int | None = None
    """moe, unimoe: experts of each token, K. Absent in unimoe: 2."""
    router_score: Literal["softmax", "sigmoid"] | None = None
    """moe, unimoe: scores over all experts together, or of each alone (DeepSeek-V3). Absent: softmax."""
    normalize_weights: bool | None = None
    """moe, unimoe: divide the weights of a token's experts by their sum. Absent: true."""
    routed_scale: float | None = None
    """moe, unimoe: then multiply them with this. Absent: 1."""
    groups: int | None = None
    """moe, unimoe: runs of experts; a token's come from its group_topk best ones. Absent: 1."""
    group_topk: int | None = None
    """moe, unimoe: groups that a token's experts may come from. Absent: 1."""
    expert_sets: dict[str, tuple[int, ...]] | None = None
    """moe, unimoe: experts that a modality may use, e.g. { text = [0, 1, 2], vision = [2, 3] }. A modality that is not
    named may use all."""
    capacity: dict[str, float] | None = None
    """moe, unimoe: by modality, the slots an expert takes of it, in multiples of its fair share, e.g. { text = 1.25,
    vision = 2.0 }; the lightest are dropped. Absent: nothing is dropped."""
    router_noise: bool | None = None
    """moe, unimoe: in training choose the second of two experts by Gumbel noise, as Uni-MoE does. Absent: false."""
    bias_rate: float | None = None
    """moe, unimoe: step of the bias that balances loads without a loss (DeepSeek-V3). Absent: 0, no bias."""
    balance_weight: float | None = None
    """moe, unimoe: weight of each sparse layer's balance loss, which is 1 when loads are even. Absent: 0; in unimoe
    0.01."""
    balance_over: Literal["micro_batch", "document", "global_batch"] | None = None
    """moe, unimoe: whose load is to be even: a micro-batch's, each document's, that of a micro-batch of all dp ranks
    together. Absent: micro_batch."""
    balance_counts: Literal["all", "first"] | None = None
    """moe, unimoe: choices that make the load: all of a token, or its first alone. Absent: all; in unimoe first."""
    z_weight: float | None = None
    """moe, unimoe: weight of the mean of logsumexp(router logits)^2. Absent: 0."""
    shared_expert_width: int | None = None
    """moe, unimoe: width of the FFN that every token passes beside its experts. Absent: 0, none."""
    shared_expert_gate: bool | None = None
    """moe, unimoe: multiply what the shared FFN gives with a learned sigmoid gate of the token. Absent: false."""
    dense_layers: tuple[int, ...] | None = None
    """moe, unimoe: numbers of layers with an FFN of ffn_width in place of experts. Absent: none."""
    sparse_every: int | None = None
    """moe, unimoe: only every k-th layer has experts, the k-th first. Absent: 1."""
    qk_norm: bool = False
    """RMS norm with gains on each query and key head, as in Qwen3."""
    qkv_bias: bool = True
    """Biases on q, k and v, as in Qwen2."""
    output_bias: bool = False
    """Bias on the attention output projection."""
    norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    rope_theta: float = 1e6
    """Base of the rotary position embedding."""
    encode_layers: int | None = None
    """unix, share: split layers at the bottom."""
    decode_layers: int | None = None
    """unix, share: split layers at the top."""
    skip_from: int = -1
    """unix, share: encode layer whose vision state is added before the matching decode layer; -1: none. Needs pp 1."""
    vision_offset: int
    """Token id of VQ code 0: the embedding rows of the base model (vocab_size of its config.json)."""
    codebook: int
    """Number of VQ codes; 0: a model of text alone."""
    vocabulary_rows: int | None = None
    """Rows of embedding and head in a file. Absent: vision_offset + codebook."""
    vision_ids: tuple[int, ...] | None = None
    """Ids below vision_offset that are vision: <|vision_start|>, separators. Absent: from the tokenizer."""
    cross_document: bool = False
    """Attention and positions run over whole packs: parity with old Uni-X checkpoints only."""
    tied: bool = True
    """The head is the embedding."""
    init: Init = field(default_factory=Init)
    """Standard deviations of the initial weights."""
    init_vision: Literal["random", "text"] = "random"
    """text: split layers start with the text weights in every modality."""
    lora: Lora = field(default_factory=Lora)
    """LoRA. Which parameters train, training.trainable says: ["*lora*"] freezes the rest."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of the mixture."""

    path: str
    """Prefix of its .bin and .idx."""
    weight: float = 1.0
    """Share of the tokens after assembly, relative to the other sources."""
    epochs: float | None = None
    """In place of weight, in all sources or in none: its share is so many times its own tokens."""
    direction: Literal["both", "t2i", "i2t"] = "both"
    """What to make of pairs of text and image: both, text to image only, image to text only."""
    megatron: bool = False
    """Megatron-LM wrote it: text with mode bytes and without a sidecar. Not needed where it has no mode bytes."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how documents become packs."""

    train: tuple[Source, ...]
    """The mixture: a list of tables with path, weight and direction."""
    evaluation: tuple[str, ...] = ()
    """Prefixes of held-out corpora. A name in the metrics is the last part of the path: no two are equal."""
    tokenizer: str = ""
    """Tokenizer folder. Absent: the one that is recorded beside the corpus."""
    pack_length: int
    """Tokens of a pack; a pack holds whole documents."""
    overlong: Literal["error", "drop", "split_text"] = "error"
    """A document longer than a pack: ends the run once its window is planned; is left out and counted in the log; is
    cut between tokens of text and between images, each part a document of its own. An image is never cut."""
    t2i_ratio: float = 0.5
    """Share of pairs that become text-to-image where the direction is free, 0 to 1."""
    unconditional_ratio: float = 0.1
    """Share of text-to-image documents whose caption is replaced by <unconditional>, 0 to 1."""
    mask_instructions: bool = True
    """No loss on prompts and captions that are given; false: all but the first token of a document is a target."""
    row_separator: int = 0
    """Codes of an image after which <|vision_pad|> is inserted, each time; 0: none."""
    templates: str = "default"
    """Prompts around pairs: default, a TOML file, or none for the caption alone."""
    window_tokens: int = 268435456
    """Tokens that mixture and packing plan at a time, at most; less where documents are short."""
    seed: int = 1
    """Seed of the order of documents and of every draw at load time."""
    allow_change: bool = False
    """Resume although [data] or a corpus changed: the order goes on as another one, documents come again or never."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are cut up. dp is what is left: world / (tp * cp * pp); ep and etp cut dp * tp once more."""

    tp: int = 1
    """Tensor-parallel size: ranks that share each layer's weights."""
    sequence_parallel: bool = False
    """Ranks of a tp group also share the tokens between the linears."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Virtual stages per rank; above 1 the schedule is interleaved."""
    layout: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers of each virtual stage from the bottom up, e.g. [10, 9, 9, 8]. auto: even, the rest goes to the middle."""
    cp: int = 1
    """Context-parallel size: ranks that share one pack."""
    ep: int = 1
    """Expert-parallel size: ranks that share one layer's experts."""
    etp: int = 1
    """Tensor-parallel size inside experts: 1, or tp."""
    dispatch: Literal["alltoall", "allgather"] = "alltoall"
    """Rows go to the ranks of their experts alone, for which the host reads their numbers once per layer (alltoall),
    or to all ranks of ep, which sends more and waits for nothing (allgather)."""
    overlap: bool = True
    """Reduce gradients and gather parameters while computing."""
    timeout_minutes: float = 30.0
    """Minutes that a rank waits for the others before it names the one that is missing and ends the run."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A factor on the learning rate of some parameters."""

    match: str
    """Pattern of parameter names, e.g. *_vision."""
    factor: float
    """Multiplies the learning rate."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate that the fall ends at, once the last step is done (not used by the constant schedule)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; none on norms and biases."""
    eps: float = 1e-8
    """Epsilon of Adam."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two averages."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_share: float = 0.1
    """wsd: share of the run, at its end, in which the rate falls; above 0, at most 1."""
    rates: tuple[Rate, ...] = ()
    """Factors for parameters by name: a list of tables with match and factor."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and numerics of the run."""

    steps: int
    """Optimizer steps of the whole run."""
    global_batch_packs: int
    """Packs of one step over all ranks."""
    micro_batch_packs: int = 1
    """Packs of one forward and backward on one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Parameters and activations; main gradients and master weights are fp32 in both."""
    recompute: Literal["none", "selective", "moe", "full"] = "none"
    """Activations computed again in the backward: none, attention and SwiGLU (selective), routed experts with all that
    is around them (moe), whole layers (full)."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a token's loss by the modality of the input token. Absent: 1. At 0 loss_MODALITY is null."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the names of parameters that are trained; the others are frozen."""
    seed: int = 1
    """Seed of the initial weights."""
    evaluate_every_steps: int = 500
    """Steps between evaluations, with one after the last step; 0: none at all."""
    max_skipped_steps: int = 3
    """Updates in a row that are left out for a loss or gradient that is not finite; one more ends the run."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and where the run is saved."""

    directory: str
    """Folder of the step folders. A run whose folder holds steps goes on from the newest whole one."""
    every_steps: int = 500
    """Steps between checkpoints, with one after the last step; 0: only that one."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, beside those by steps; 0: only by steps."""
    keep: int = 3
    """How many of the latest checkpoints are kept."""
    optimizer: Literal["reshardable", "fast"] = "reshardable"
    """Optimizer state that loads under any topology, or (fast) under the same one only, in fewer pieces."""
    asynchronous: bool = False
    """Write checkpoints in a process of their own while training goes on; a step appears once it is whole."""
    initial: str = ""
    """A checkpoint whose weights start the run; model.init_vision is random then. Absent: random weights."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where the metrics go."""

    directory: str
    """Folder of metrics.jsonl, tensorboard/ and profile/; one that holds another run's records is refused."""
    every_steps: int = 10
    """Steps between records."""
    wandb: bool = False
    """Also send the metrics to Weights and Biases; its own WANDB_ variables say which project, and whether offline."""
    profile: tuple[int, int] | None = None
    """First and last step of a torch.profiler trace, e.g. [10, 12]; one file per rank. Absent: none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run, resolved: what training works from and what is stored beside its checkpoints."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    kernels: dict[str, str] = field(default_factory=dict)
    """Implementation of an op by name, e.g. swiglu = "reference". Absent: auto, the first that can run."""
