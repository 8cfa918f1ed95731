"""Every setting of s2w, as OmegaConf structured configs; ``s2w train --help`` prints this file's text.

A setting is documented by the string under it. Its type holds its range and, where it does not change what is computed,
``Resumable``: a resumed run may change it. :mod:`s2w.config.bounds` rejects values outside a range,
:mod:`s2w.launch.check` impossible combinations, before anything starts. ``dtype: auto`` is bfloat16 where the hardware
multiplies it natively (CUDA, AMX, AVX512-BF16) and float32 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from annotated_types import Ge, Gt, Interval
from omegaconf import MISSING

from s2w.config.bounds import RESUMABLE, OneOf, Or
from s2w.records import HiddenDtype, Mode, SignalKind

T = TypeVar("T")
Resumable = Annotated[T, RESUMABLE]
Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Nonnegative = Annotated[float, Ge(0)]
AboveZero = Annotated[float, Gt(0)]
Temperature = Annotated[float, Interval(ge=0.01, le=2), Or(0)]
"""Values that vLLM uses as given: it raises smaller ones above 0 to 0.01."""
TopP = Annotated[float, Interval(gt=0, le=1)]
TopK = Annotated[int, Ge(1), Or(-1)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
EngineDtype = Annotated[str, OneOf("auto", "bfloat16", "float16", "float32")]
DEFAULT_VERIFIER = "math_verify"
"""What checks an answer where nothing else is named, in training and evaluation alike."""
Schedule = Annotated[str, OneOf("constant", "cosine")]

# OmegaConf does not know Literal: to it these are strings with the same choices.
if TYPE_CHECKING:
    ModeSetting: TypeAlias = Mode
    KindSetting: TypeAlias = SignalKind
    HiddenDtypeSetting: TypeAlias = HiddenDtype
else:
    ModeSetting = Annotated[
        str,
        OneOf(
            think="With a think block.",
            no_think="With an empty think block, or none where the chat template has no thinking.",
        ),
    ]
    KindSetting = Annotated[
        str,
        OneOf(
            hidden="Last hidden states: the exact distribution, 2 bytes x width per token (bf16).",
            topk="The teacher's top_k most likely ids, exact log-probs and exact tail mass.",
            ids="The teacher's log-probs at the student's own top_k ids, with the tail mass.",
            sampled="The teacher's log-prob of the sampled token: reverse KL by policy gradient.",
        ),
    ]
    HiddenDtypeSetting = Annotated[
        str,
        OneOf(
            auto="In the teacher's own dtype.",
            bfloat16="2 bytes per number.",
            float8="e4m3 with a float32 scale per token: half of bfloat16; docs/signals.md has the error in nats.",
        ),
    ]

StudentInit = Annotated[
    str,
    OneOf(
        checkpoint="student.model as it is (hub id or path).",
        pruned="A copy of student.model that keeps student.keep_layers evenly spaced layers.",
        fresh="Random weights for the configuration of student.model, changed by student.overrides.",
    ),
]
Preflight = Annotated[
    str,
    OneOf(
        "none",
        divergence="The learner ranks load the teacher as their student, and its divergence through the run's own "
        "engines and wire must be zero up to rounding. They need room for it, at the run's ZeRO stage.",
        log_probs="For teachers that the ranks cannot hold: what the learner decodes from the signals against the "
        "log-probs of the teacher in a generating vLLM engine, which starts and ends before the others.",
    ),
]
Resume = Annotated[
    bool | str,
    OneOf(False, True, auto="Start a run if run.dir holds none, else continue it: one command that can be repeated."),
]


@dataclass
class TeacherConfig:
    """The teacher: vLLM engines that score and never generate."""

    model: str = MISSING
    """Hub id or path of the teacher's checkpoint."""
    revision: str | None = None
    """Hub revision; null is the default branch."""
    dtype: EngineDtype = "auto"
    """auto, bfloat16, float16 or float32."""
    replicas: Resumable[Positive] = 1
    """Engines that share the scoring."""
    tensor_parallel: Positive = 1
    """GPUs (CPU: worker processes) that share each layer."""
    pipeline_parallel: Positive = 1
    """Groups of layers, each on its own GPUs; an engine takes tensor_parallel x pipeline_parallel GPUs."""
    expert_parallel: bool = False
    """Spread whole experts over the tensor-parallel ranks (MoE teachers)."""
    context: str | None = None
    """Privileged context: what the teacher reads in place of the last user message, with {question} for that message,
    {answer} for the reference answer and {COLUMN} for a text in that column of the prompt's row. It scores the
    student's tokens under it (OPSD, arXiv 2601.18734)."""
    system_prompt: str | None = None
    """What the teacher reads in place of the system message, or before messages that have none."""
    max_model_len: Positive | None = None
    """Longest prompt plus response; null takes data.max_prompt_tokens + rollout.max_tokens."""
    max_batched_tokens: Positive = 2048
    """Tokens of one prefill chunk."""
    max_sequences: Positive = 64
    """Requests that one engine scores at once."""
    gpus: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of a GPU, and of its memory, that each worker of an engine reserves on a GPU cluster; below 1, others use
    the same GPU (experiment=one_gpu)."""
    gpu_memory_utilization: Annotated[float, Interval(gt=0, le=1)] = 0.9
    """Share of that memory that vLLM takes."""
    kv_cache_gib: Resumable[Positive] = 1
    """KV cache of an engine on CPU."""
    enforce_eager: bool = False
    """No torch.compile and no CUDA graphs: starts sooner, runs slower."""
    cpus: Resumable[Nonnegative] = 0.5
    """Ray CPUs that one engine reserves."""
    threads: Resumable[Positive | None] = None
    """CPU only: cores per engine; null is all of the node's."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, such as {quantization: fp8, kv_cache_dtype: fp8}. They replace what
    s2w sets, and `s2w plan` does not know them."""


@dataclass
class StudentConfig:
    """The student's checkpoint and first weights."""

    model: str = MISSING
    """Hub id or path: the checkpoint (or, for init=fresh, the config and tokenizer) to start from."""
    revision: str | None = None
    """Hub revision; null is the default branch."""
    init: StudentInit = "checkpoint"
    """Where the first weights come from."""
    keep_layers: Positive | None = None
    """init=pruned: layers kept, evenly spaced, including the first and the last."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """init=fresh: fields of the model's configuration to change, such as {num_hidden_layers: 4}."""
    thinking_switch: bool = False
    """Add Qwen3's enable_thinking to a chat template without thinking: False puts an empty think block before the
    answer. The student's checkpoints include the new template."""


@dataclass
class RolloutConfig:
    """The pool of vLLM engines that run the student."""

    engines: Resumable[Positive] = 1
    """Engines of the pool, independent of the sizes of the learner and the teacher."""
    tensor_parallel: Positive = 1
    """GPUs (CPU: worker processes) that share each layer."""
    pipeline_parallel: Positive = 1
    """Groups of layers, each on its own GPUs; an engine takes tensor_parallel x pipeline_parallel GPUs."""
    expert_parallel: bool = False
    """Spread the experts of a MoE student over the workers of an engine."""
    max_tokens: Positive = 1024
    """Longest response, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: TopP = 1.0
    """Nucleus sampling; 1 keeps every token."""
    top_k: TopK = -1
    """-1 keeps every token."""
    thinking_budget: Positive | None = None
    """Response tokens after which a think block that is still open is closed; null lets it run to max_tokens."""
    stop_thinking: str = (
        "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
        "</think>.\n\n"
    )
    """Text that closes it, inserted after thinking_budget tokens (Qwen3 Technical Report, section 4.3)."""
    dtype: EngineDtype = "auto"
    """auto, bfloat16, float16 or float32."""
    max_sequences: Positive = 64
    """Requests that one engine runs at once."""
    max_batched_tokens: Positive | None = None
    """Tokens of one prefill chunk; null is vLLM's default (on CPU: whole prompts, never split)."""
    gpus: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of a GPU, and of its memory, that each worker of an engine reserves on a GPU cluster; below 1, others use
    the same GPU (experiment=one_gpu)."""
    gpu_memory_utilization: Annotated[float, Interval(gt=0, le=1)] = 0.9
    """Share of that memory that vLLM takes."""
    kv_cache_gib: Resumable[Positive] = 1
    """KV cache of an engine on CPU."""
    enforce_eager: bool = False
    """No torch.compile and no CUDA graphs: starts sooner, runs slower."""
    cpus: Resumable[Nonnegative] = 0.5
    """Ray CPUs that one engine reserves."""
    threads: Resumable[Positive | None] = None
    """CPU only: cores per engine; null is all of the node's."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, such as {quantization: fp8, kv_cache_dtype: fp8}. They replace what
    s2w sets, and `s2w plan` does not know them."""


@dataclass
class SampleRollout(RolloutConfig):
    """The engines of `s2w sample`: the checkpoint recommends the sampling."""

    max_tokens: Positive = 4096
    """Longest response, in tokens; it ends earlier where the model's context does."""
    temperature: Temperature | None = None  # type: ignore[assignment]
    """Sampling temperature; 0 is greedy. null: as the checkpoint's generation_config.json recommends for the prompt's
    mode, else as Qwen3 does (think: 0.6, top_p 0.95, top_k 20; no_think: 0.7, 0.8, 20)."""
    top_p: TopP | None = None  # type: ignore[assignment]
    """Nucleus sampling; 1 keeps every token. null: as for temperature."""
    top_k: TopK | None = None  # type: ignore[assignment]
    """-1 keeps every token. null: as for temperature."""


@dataclass
class LearnerConfig:
    """The DeepSpeed ranks that update the student."""

    ranks: Positive = 1
    """Processes of the learner group, with one GPU each on a GPU cluster."""
    zero_stage: Annotated[int, Interval(ge=0, le=3)] = 2
    """0 to 3; 3 shards the weights too."""
    dtype: Annotated[str, OneOf("auto", "bfloat16", "float32")] = "auto"
    """Dtype of the weights in matrix products; the optimizer's master copy is always float32."""
    learning_rate: AboveZero = 1e-5
    """Peak learning rate, reached after warm-up."""
    schedule: Schedule = "constant"
    """Learning rate after warm-up: constant, or cosine down to min_lr_ratio at the last step."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.0
    """schedule=cosine: the last learning rate divided by the peak."""
    weight_decay: Nonnegative = 0.0
    """AdamW's weight decay, on matrices only."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    eps: AboveZero = 1e-8
    """AdamW's term in the denominator."""
    max_grad_norm: Nonnegative = 1.0
    """Gradient norm above which gradients are clipped; 0 does not clip."""
    max_skipped_steps: Natural = 3
    """Consecutive steps that may have a non-finite gradient. Such a step leaves the weights as they are; one more ends
    the run."""
    tokens_per_micro_batch: Positive = 4096
    """Prompt and response tokens, padding included, in one forward and backward pass of a rank."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    attention: Annotated[str, OneOf("sdpa", "eager", "flash_attention_2")] = "sdpa"
    """transformers' attn_implementation: sdpa, eager or flash_attention_2."""
    cpus: Resumable[Nonnegative] = 0.5
    """Ray CPUs that one rank reserves."""
    gpus: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of a GPU that one rank reserves on a GPU cluster; below 1, rollout engines use the same GPU."""
    threads: Resumable[Positive | None] = None
    """CPU only: threads of one rank; null divides the node's cores among the ranks."""


@dataclass
class SignalConfig:
    """What the teacher sends for each response token."""

    kind: KindSetting = "hidden"
    """What the teacher sends about each response token."""
    top_k: Positive = 64
    """Ids per token, for topk and ids."""
    dtype: HiddenDtypeSetting = "auto"
    """kind=hidden: how hidden states travel from the teacher to the learner."""
    bias_every: Resumable[Natural] = 0
    """kind=hidden: every this many steps, measure on one micro-batch of each rank what topk, ids and sampled would have
    given instead (metrics.jsonl, `s2w signals RUN`); 0 is never."""


@dataclass
class LossConfig:
    """What the student minimises."""

    objective: str = "divergence"
    """What the on-policy phase minimises: a name of s2w.objectives, listed below."""
    divergence: str = "forward_kl"
    """A name of s2w.objectives.divergences, listed below."""
    beta: Share = 0.5
    """jsd: weight of the teacher in the mixture (GKD, arXiv 2306.13649, eq. 1)."""
    alpha: Share = 0.1
    """skew_forward_kl, skew_reverse_kl, alpha_divergence: their alpha."""
    temperature: AboveZero = 1.0
    """Divides the logits of both sides."""
    temperature_squared: bool = True
    """Multiply the loss by temperature^2, which keeps the gradient's scale (Hinton et al. 2015, section 2)."""
    discount: Share = 0.0
    """signal.kind=sampled: gamma above 0 also credits a token with later log-ratios, each times gamma^distance; 1 is
    the gradient of the whole response's reverse KL (MiniLLM, arXiv 2306.08543), 0 that of each token's."""
    importance_limit: AboveZero | None = None
    """signal.kind=sampled: upper limit of a stale token's importance weight q / q_sampling (V-trace's rho-bar, arXiv
    1802.01561); null is no limit."""
    chunk_rows: Positive = 1024
    """Rows of the [rows, vocabulary] buffers: memory of the loss, not its value."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the objective and the divergence that no section has, by name: {part_nats: 20}."""


@dataclass
class RewardConfig:
    """The verified reward of a response: 1 if the verifier of its prompt's task scores the answer 1, else 0.

    Its policy gradient is GRPO's (arXiv 2402.03300, eq. 3, outcome supervision), without a reference model: the
    advantage of a response is its reward minus the mean of the responses to the same prompt (loop.samples_per_prompt of
    them), and every token of the step has the same weight.
    """

    weight: Nonnegative = 0.0
    """loss.objective=kdrl: weight of the policy gradient next to the divergence."""
    normalize: bool = True
    """Divide the advantages of a prompt by their standard deviation (GRPO; false as in Dr. GRPO, arXiv 2503.20783)."""
    clip_low: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Lower clipping of the importance ratio (PPO's epsilon); it affects only stale tokens."""
    clip_high: AboveZero = 0.2
    """Upper clipping of the importance ratio."""


@dataclass
class LoopConfig:
    """The loop: generate, score, update, hot swap."""

    steps: Resumable[Natural] = 100
    """Updates of the student; 0 skips the on-policy phase."""
    prompts_per_step: Positive = 64
    """Prompts per batch."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt."""
    off_policy_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of a batch's prompts whose responses are the teacher's, from the off-policy set, instead of the
    student's: 1 - lambda of GKD (arXiv 2306.13649, algorithm 1). They are scored and trained on like the others."""
    unreliable_weight: Share = 1.0
    """Below 1, responses to prompts that the teacher is known to get wrong are down-weighted: the divergence at their
    tokens has weight u + (1 - u) r, where u is this setting and r the share of the teacher's own answers to the prompt,
    in the off-policy set, that were verified. (On prompts that a teacher always gets wrong: arXiv 2605.09725.) Prompts
    that the teacher did not answer have weight 1."""
    max_staleness: Natural = 0
    """How many versions old the policy that sampled a token may be when the token is trained on. 0: each batch is
    sampled from the weights that train on it. n: generation runs up to n batches ahead."""
    eval_every: Resumable[Natural] = 0
    """Held-out KL every this many steps, as well as before and after; 0 is only before and after."""
    eval_teacher: Resumable[bool | None] = None
    """Have the teacher itself respond to the held-out prompts, once a run: the ceiling that the report shows beside
    before and after. null: where `teacher` generates the off-policy responses and takes all held-out prompts, since its
    engines are up then; true: always, which elsewhere starts and ends generating engines with the checkpoint of each
    teacher before the other parts (minutes for a large one); false: never."""
    checkpoint_every: Resumable[Natural] = 0
    """A checkpoint every this many steps, as well as the last; 0 is only the last."""
    keep_checkpoints: Resumable[Positive] = 2
    """How many of the latest checkpoints stay on disk."""


@dataclass
class FilterConfig:
    """Which of the teacher's responses are dropped before the student trains on them, in this order."""

    truncated: bool = True
    """Drop those that were cut off, at the token limit or by an engine (finish_reason other than stop)."""
    format: bool = True
    """Drop those that leave their think block open, or think in no_think mode, or do not in think mode."""
    min_tokens: Natural = 1
    """Drop shorter responses, in tokens."""
    max_tokens: Positive | None = None
    """Drop longer responses; null is off_policy.max_tokens. Prompts longer than data.max_prompt_tokens go too."""
    loop_ngram: Natural = 128
    """Drop responses that repeat a sequence of up to this many tokens four or more times in a row; 0 drops none."""
    loop_tokens: Natural = 64
    """Fewest tokens that such repetitions must cover."""
    cjk_share: Share = 0.01
    """Drop responses with more than this share of Chinese, Japanese or Korean characters, to prompts without any; 1
    drops none."""
    duplicates: bool = True
    """Drop a response that is, token for token, another one to the same prompt in the same mode."""
    verified: bool = True
    """Drop wrong answers: those that the verifier of the prompt's task scores below 1. Prompts without a task pass."""


@dataclass
class OffPolicyConfig:
    """The first phase: the teacher answers, in every mode, and the student trains on its answers."""

    steps: Natural = 0
    """Updates of the student in this phase; 0 skips the phase. They may go through the responses several times."""
    loss: str = "cross_entropy"
    """What the phase minimises: cross_entropy or divergence (s2w.objectives)."""
    path: str | None = None
    """Existing responses instead of generated ones: a JSONL or Parquet file, or a directory of Parquet files, with the
    columns `messages` (the last one the assistant's), or `prompt` and `response`; also `mode`, `task`, `answer`."""
    prompts: Positive | None = None
    """Training prompts that the teacher answers, each in all of data.modes; null is all of them."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt, in each mode."""
    max_tokens: Positive = 1024
    """Longest response, in tokens."""
    temperature: Temperature = 0.6
    """The teacher's sampling temperature; 0 is greedy. The defaults are Qwen3's own for thinking."""
    top_p: TopP = 0.95
    """Nucleus sampling; 1 keeps every token."""
    top_k: TopK = 20
    """-1 keeps every token."""
    engines: Resumable[Positive | None] = None
    """vLLM engines that generate, before any other part starts; null is teacher.replicas."""
    shard_responses: Resumable[Positive] = 512
    """Responses per Parquet file; the most that an interruption can lose."""
    responses_per_step: Positive = 64
    """Responses per update."""
    heldout_responses: Natural = 64
    """Responses kept out of training for the held-out loss; none of their prompts is trained on."""
    learning_rate: AboveZero = 1e-5
    """Peak learning rate of this phase, reached after warm-up. All other optimizer settings are the learner's."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up: constant, or cosine down to min_lr_ratio at the last step of the phase."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.0
    """schedule=cosine: the last learning rate divided by the peak."""
    eval_every: Resumable[Natural] = 0
    """Held-out loss every this many steps, as well as before and after; 0 is only before and after."""
    checkpoint_every: Resumable[Natural] = 0
    """A checkpoint every this many steps, as well as the last; 0 is only the last."""
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass
class DataConfig:
    """Prompts: procedural tasks or a file."""

    tasks: list[str] = field(default_factory=list)
    """reasoning-gym task names, mixed in equal parts."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of a task, by its name: {chain_sum: {max_terms: 3}}."""
    path: str | None = None
    """Instead of tasks: a JSONL, Parquet or CSV file of prompts, with a column `messages` or `prompt`."""
    heldout_path: str | None = None
    """File of held-out prompts; null draws heldout_prompts of `path`, by run.seed."""
    verifier: str | None = DEFAULT_VERIFIER
    """What checks answers to rows of a file without a `task`, ready responses' included: math_verify or exact_match
    (rows with an `answer`), or a function of your own as package.module:function (all rows); null: nothing
    (docs/data.md)."""
    train_prompts: Positive = 1024
    """Prompts generated for training (tasks only); when they run out, another epoch starts."""
    heldout_prompts: Positive = 64
    """Prompts of the held-out evaluation, one response each."""
    modes: list[ModeSetting] = field(default_factory=list)
    """Modes of prompts that do not name their own, in equal parts: think, no_think; empty means all that the chat
    template can ask for."""
    task_modes: dict[str, Any] = field(default_factory=dict)
    """Modes of individual tasks, by name: {chain_sum: [no_think]}; the others have those of `modes`."""
    think_ratio: Share | None = None
    """Share of on-policy training prompts in think mode, among those that may be in either; each prompt's mode is then
    drawn anew for every batch. null: a prompt keeps its mode, in equal parts."""
    think_ratio_end: Share | None = None
    """The same at the last step: the share moves there linearly from think_ratio; null keeps it."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt, in tokens; a longer one is refused."""
    system_prompt: str | None = None
    """Put before messages that have no system turn."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template."""


@dataclass
class ClusterConfig:
    """The Ray cluster."""

    address: Resumable[str | None] = None
    """Ray address; null joins the cluster of `ray job submit` or `ray start`, or starts one on this machine."""
    device: Resumable[Annotated[str, OneOf("auto", "cuda", "cpu")]] = "auto"
    """cuda, cpu, or auto: cuda if the cluster has GPUs."""
    log_to_driver: Resumable[bool] = False
    """Show what the actors print, with the INFO messages of vLLM, DeepSpeed and Ray; `-v` sets it. Ray's log directory
    has what they print in any case."""
    start_timeout_s: Resumable[Positive] = 900
    """How long actors may take to be placed and to load their models."""
    start_attempts: Resumable[Positive] = 3
    """How often the start of an engine that dies of it is tried: the first one, without which the run ends, and that of
    a replacement, with growing pauses, without which it goes on until no engine of a kind is left."""
    hang_timeout_s: Resumable[Positive] = 300
    """How long an engine may give no sign of life before it is ended and replaced, like one that has died."""
    dry_run: Resumable[bool] = False
    """Place empty actors where the run would have its own, say where they are, and end."""
    nodes: Resumable[list[dict[str, Any]]] = field(default_factory=list)
    """`s2w plan`: a cluster that is only described: [{count: 10, gpus: 8, gpu_memory_gib: 80}], with name, cpus,
    memory_gib, shm_gib and object_store_gib if known; empty is the cluster of `address`."""


@dataclass
class PlanConfig:
    """What `s2w plan` assumes; nothing here changes a run.

    Peak rates are those of one GPU (CPU: one core); null is an H100 SXM's data sheet, without sparsity, or what was
    measured on a core with AVX512-BF16. docs/plan.md has the formulas and the sources.
    """

    prompt_tokens: Resumable[Positive | None] = None
    """Mean prompt, tokens; null takes data.max_prompt_tokens, the most that there can be."""
    response_tokens: Resumable[Positive | None] = None
    """Mean response of the student, tokens; null takes rollout.max_tokens, the most that there can be."""
    off_policy_tokens: Resumable[Positive | None] = None
    """Mean response of the teacher in the off-policy phase, tokens; null takes off_policy.max_tokens."""
    gpu_memory_gib: Resumable[AboveZero | None] = None
    """Memory of a GPU where the cluster does not say; null takes it from the accelerator type that Ray reports."""
    peak_tflops: Resumable[AboveZero | None] = None
    """Matrix products in the dtype of the models, 10^12 per second."""
    peak_fp8_tflops: Resumable[AboveZero | None] = None
    """The same in FP8, for FP8 checkpoints."""
    memory_gb_per_s: Resumable[AboveZero | None] = None
    """Memory rate, 10^9 bytes per second."""
    node_gb_per_s: Resumable[AboveZero] = 450.0
    """Rate between the GPUs of a node, one way, 10^9 bytes per second (NVLink of an H100)."""
    network_gb_per_s: Resumable[AboveZero] = 50.0
    """Rate of a GPU's share of the network between nodes, one way (400 Gbit/s for each GPU)."""
    prefill_utilization: Resumable[Annotated[float, Interval(gt=0, le=1)]] = 0.4
    """Share of peak_tflops that a prefill reaches: the teacher's scoring, prompts."""
    decode_utilization: Resumable[Annotated[float, Interval(gt=0, le=1)]] = 0.5
    """Share of memory_gb_per_s that decoding reaches."""
    decode_overhead_ms: Resumable[Nonnegative] = 2.0
    """Time of a decoding step beside reading memory: launches, sampling, the scheduler."""
    learner_utilization: Resumable[Annotated[float, Interval(gt=0, le=1)]] = 0.3
    """Share of peak_tflops that the learner's forward and backward passes reach."""
    network_utilization: Resumable[Annotated[float, Interval(gt=0, le=1)]] = 0.6
    """Share of the rates between GPUs that a collective reaches."""
    swap_pause_s: Resumable[Nonnegative] = 0.5
    """Time of a swap beside the broadcast: pause, repacking of weights, probe."""


@dataclass
class RunConfig:
    """The run: where it writes, its seed, what it shows."""

    dir: Resumable[str] = "runs/${run.name}-${now:%Y%m%d-%H%M%S}"
    """The run directory."""
    name: Resumable[str] = "s2w"
    """The run's name, in the directory and in W&B."""
    seed: Seed = 0
    """Seed of data order, sampling and fresh weights."""
    resume: Resumable[Resume] = False
    """Continue the run in run.dir from its last checkpoint."""
    deterministic: Resumable[bool] = False
    """Same seed, same rollouts and losses; slower, and needs max_staleness=0."""
    tensorboard: Resumable[bool] = True
    """Write tensorboard/ in the run directory."""
    wandb: Resumable[bool] = False
    """Log to Weights & Biases too (pip install 's2w[wandb]'; WANDB_MODE=offline in the environment sends nothing)."""
    wandb_project: Resumable[str] = "s2w"
    """The W&B project."""
    preflight: Resumable[Preflight] = "none"
    """Fail at the start if the learner does not decode what the teacher computed (docs/signals.md)."""
    probe_tolerance: Resumable[AboveZero | None] = None
    """Mean |log-prob difference| between engine and learner, in nats, above which a swap fails the run; null is
    0.001 where both run in float32 and 0.25 otherwise."""


@dataclass
class EvalConfig:
    """What `s2w eval` measures: problems, samples, modes."""

    tasks: list[str] = field(default_factory=list)
    """reasoning-gym task names."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of a task, by its name: {chain_sum: {max_terms: 3}}."""
    problems: Positive = 64
    """Problems generated for each task; the same ones that `s2w train` holds out with the same seed."""
    path: str | None = None
    """Instead of tasks: a file of problems (JSONL, Parquet or CSV), or hf://datasets/OWNER/NAME[@REVISION]/FILE."""
    prompt_column: str | None = None
    """Column of the file with the question: text, or a list of chat messages; null: `messages`, else `prompt`, as in
    files to train on."""
    answer_column: str = "answer"
    """Column of the file with the right answer; empty where a verifier of your own needs none."""
    task_column: str = "task"
    """Column of the file with a row's own verifier, as in files to train on; empty: eval.verifier checks every row."""
    choice_columns: list[str] = field(default_factory=list)
    """Multiple choice: columns with the wrong answers; choices are shuffled, and the right answer is a letter."""
    template: str = "{question}"
    """Text of the last message; {question} stands for the prompt and, in multiple choice, its lettered choices."""
    verifier: str = DEFAULT_VERIFIER
    """What checks answers of a file's rows without a task, as data.verifier: math_verify, exact_match, or a function of
    your own as package.module:function (docs/data.md). Letters of choices: always exact_match."""
    samples: Positive = 4
    """Responses to each problem in each mode."""
    k: list[Positive] = field(default_factory=lambda: [1])
    """Values of k for pass@k, none above samples."""
    modes: list[ModeSetting] = field(default_factory=list)
    """think, no_think; empty means all that the chat template can ask for."""
    thinking_budgets: list[Positive | None] = field(default_factory=list)
    """Measure think mode at each of these budgets, null being none; empty means rollout.thinking_budget alone."""
    seed: Seed = 0
    """Seed of generated problems, sampling, the order of choices and the bootstrap."""
    max_prompt_tokens: Positive = 4096
    """Longest prompt, in tokens; a longer one is refused."""
    system_prompt: str | None = None
    """Put before messages that have no system turn."""
    output: str | None = None
    """JSON file for the report."""


@dataclass
class EvalRun:
    """The whole configuration of `s2w eval`."""

    model: str = MISSING
    """A run directory (its newest checkpoint), a checkpoint's directory, or a hub id."""
    revision: str | None = None
    """Hub revision; null is the default branch."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass
class SampleRun:
    """The whole configuration of `s2w sample`."""

    model: str = MISSING
    """A run directory (its newest checkpoint), a checkpoint's directory, or a hub id."""
    revision: str | None = None
    """Hub revision; null is the default branch."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """A second model that answers the same prompts, and its settings: {model: PATH, revision: NAME}, and those of
    `rollout` where it differs from the first: {tensor_parallel: 4}."""
    mode: ModeSetting | None = None
    """Mode of all prompts that do not say /think or /no_think themselves; null: a row's own mode, else think where the
    chat templates can ask for it."""
    system_prompt: str | None = None
    """Put before messages that have no system turn."""
    max_prompt_tokens: Positive = 2048
    """Longest prompt that is typed, in tokens."""
    seed: Seed = 0
    """Seed of sampling."""
    rollout: SampleRollout = field(default_factory=SampleRollout)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass
class Config:
    """The whole configuration of `s2w train`."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, Any] = field(default_factory=dict)
    """Further teachers that score, by a name of your choice: {solver: {model: PATH, modes: [think], tasks: [TASK]}}. A
    response is scored by the first whose modes and tasks (either may be left out) include its prompt's, else by
    `teacher`, whose settings they also inherit where they give none. The off-policy responses are `teacher`'s."""
    reference: dict[str, Any] = field(default_factory=dict)
    """Engine settings for the student's first weights, where the objective has them score; those of `teacher` where it
    gives none: {replicas: 1, tensor_parallel: 1}."""
    student: StudentConfig = field(default_factory=StudentConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    signal: SignalConfig = field(default_factory=SignalConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    run: RunConfig = field(default_factory=RunConfig)
