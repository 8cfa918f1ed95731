"""One rank of the learner: a Ray actor that holds a DeepSpeed engine."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import ray
import torch
from torch import nn
from torch.distributed import ReduceOp

from s2w.config import LearnerConfig, Objective
from s2w.hardware import core_count
from s2w.learner import checkpoint
from s2w.learner.divergence import Divergence, make_divergence
from s2w.learner.fused_kl import Head, HiddenRows, PolicyRows, SampledRows, SparseRows, TeacherRows
from s2w.learner.messages import (
    STATISTICS,
    MicroBatchWork,
    NonFiniteError,
    RankSpec,
    RankStep,
    SignalLostError,
    StepRefusedError,
    sequence_length,
)
from s2w.learner.signal_bias import SignalSums
from s2w.learner.signals import Fetched, HiddenParts, SignalStream, fetch, first_flaw, joined
from s2w.learner.student_model import StudentModel, Tokens, load_student
from s2w.records import Scored
from s2w.teacher.head import load_head
from s2w.weights.names import CheckpointStream
from s2w.weights.transfer import create_transfer

_RANKS = "ranks"
"""DeepSpeed's tag: the directory with the files of every rank."""

BUCKET_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Gradient elements that the ranks reduce at once, by device: enough for a message to be worth sending. DeepSpeed takes
8 bytes for each (the gradient, a flat copy of it, that in float32); with its default, 5e8, a small model's gradients
would all be there three times. A larger parameter is reduced by itself."""
NORM_ELEMENTS = 1 << 20
"""Gradient elements of which the norm is taken at once, in float64."""


class LearnerRank:
    """A DeepSpeed rank. Methods marked *collective* must be called on all ranks at once, in the same order.

    Memory (`benchmarks/memory.py`): at ZeRO stage 2 in bfloat16 18 bytes a parameter (weights 2, float32 master copy 4,
    moments 8, float32 gradients 4; of all but the weights a rank has its share), and these buffers, for V tokens and
    widths d (student) and d_t (teacher), b bytes an element:

    - activations, and for the loss two [chunk_rows, V] products;
    - gradient of the head: (4 + b) V d while the loss is made, then b V d, twice if it is also the embedding's;
    - gradients on their way to other ranks: (4 + b) bytes an element of the largest parameter, 8 x BUCKET_ELEMENTS;
    - b V d_t for each teacher's head, which is the file's own page cache where the checkpoint has the dtype;
    - on the CPU, from the first swap on, a copy of the weights in the engines' dtype (rank 0);
    - for a checkpoint, a shard of at most 5 GiB (rank 0).

    In float32 it is 20 at stage 0 (16, and the flat copy in which DeepSpeed reduces gradients) and 21 at stage 2.
    """

    def __init__(self, rank: int, world: int) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.rank, self.world = rank, world
        # Made by build, which every later call needs.
        self.engine: Any = None
        self.lm: Any = None
        self.transfer: Any = None

    def place(self) -> tuple[str, str, int, int]:
        """Node id, address of the node, a free port, cores that this process may use."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port, core_count()

    def connect(self, address: str, port: int, device: str, threads: int) -> None:
        """Joins the process group; collective.

        Args:
            address: of rank 0.
            threads: of this rank's CPU kernels.
        """
        torch.set_num_threads(threads)
        # Ray shows a rank its own GPU only.
        os.environ |= {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": "0",
        }
        # On CPU DeepSpeed would compile an all-reduce over shared memory (minutes, a C++ compiler) whose ranks spin
        # while they wait; plain gloo sleeps.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)

    def build(self, spec: RankSpec) -> None:
        """Loads the student and makes the engine, in place of an earlier one; collective."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = self.lm = self.transfer = None
            gc.collect()
        self.spec = spec
        learner = spec.learner
        self.device = torch.device(spec.device)
        torch.manual_seed(spec.seed + self.rank)
        settings = deepspeed_settings(learner, spec.dtype, spec.device)

        self.student_path = spec.student.resolve()
        zero3 = settings if learner.zero_stage == 3 else None
        self.lm = load_student(self.student_path, getattr(torch, spec.dtype), learner.attention, zero3)
        if learner.activation_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        divergence = make_divergence(spec.loss.divergence, beta=spec.loss.beta, alpha=spec.loss.alpha)
        model = StudentModel(self.lm, spec.loss, divergence, spec.vocab_size)

        optimizer = torch.optim.AdamW(
            parameter_groups(self.lm, learner.weight_decay),
            lr=learner.learning_rate,
            betas=(learner.beta1, learner.beta2),
            eps=learner.eps,
            fused=True,
        )
        self.unsharded_grad_norm = float("nan")
        if learner.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip_unsharded)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        if hasattr(self.engine.optimizer, "get_grad_norm_direct"):
            norm_in_pieces(self.engine.optimizer)

        self.teacher_heads: dict[str, Head] = {}
        if spec.signal == "hidden" and spec.loss.objective is Objective.divergence:
            for name in spec.teachers:
                self._teacher_head(name)
        stream = CheckpointStream(self.lm, self.named_full_parameters, getattr(torch, spec.engine_dtype))
        self.transfer = create_transfer(spec.device, stream, self.rank)

    def step(
        self,
        work: Sequence[MicroBatchWork],
        global_tokens: int,
        learning_rate: float,
        step: int,
        measure_bias: bool = False,
    ) -> RankStep:
        """One optimizer step; collective.

        The objective is the mean over all sampled tokens of the step, on whatever rank and in whatever micro-batch
        they are: every token has the same weight, but for ``Scored.weight``, and a long response counts for more
        than a short one.

        Args:
            work: this rank's micro-batches; equally many on every rank.
            global_tokens: sampled response tokens of the step, over all ranks.
            step: number of the step, for messages and file names.
            measure_bias: compare the signals on the first micro-batch (:mod:`s2w.learner.signal_bias`).

        Raises:
            SignalLostError, NonFiniteError: on all ranks, before the optimizer step; nothing has changed.
        """
        self.engine.train()
        self.engine.module.flawed.clear()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        stream = signal_stream(work)
        # DeepSpeed averages gradients over ranks: world undoes that.
        row_weight = self.world / global_tokens
        loss = torch.zeros((), device=self.device)
        statistics: list[torch.Tensor] = []
        bias: dict[str, SignalSums] = {}
        lost: str | None = None
        for item, signals in zip(work, stream, strict=True):
            tokens = pack(item.samples).to(self.device)
            if signals is not None and signals.error is not None:
                lost = lost or signals.error
            if not item.weighted or (signals is not None and signals.error is not None):
                output = self.engine(tokens)
            else:
                teacher = self._teacher_rows(item.samples, signals)
                weights = self._rows(item.samples, [row_weight * sample.weight for sample in item.samples])
                policy = self._policy_rows(item.samples, row_weight)
                output = self.engine(tokens, teacher, weights, policy, measure_bias=measure_bias and not statistics)
                bias |= output.get("signal_bias", {})
                loss += output["loss"].detach()
                statistics.append(torch.stack([output[name] for name in STATISTICS]))
            self.engine.backward(output["loss"], scale_wrt_gas=False)

        weighted = [item for item in work if item.weighted]
        sums = np.zeros((0, len(STATISTICS)))
        if lost is None and weighted:
            sums = sample_sums([s for item in weighted for s in item.samples], torch.cat(statistics, 1))
        self._agree_to_go_on(step, weighted, sums, lost)

        self.engine.step()
        grad_norm = self.unsharded_grad_norm
        if self.spec.learner.zero_stage > 0:
            grad_norm = float(self.engine.get_global_grad_norm())
        flawed: list[str] = []
        if not np.isfinite(grad_norm):
            grad_norm = float("inf")
            flawed = [
                sample.rollout.uid
                for item, flags in zip(work, self.engine.module.flawed, strict=True)
                for sample, flag in zip(item.samples, flags.tolist(), strict=True)
                if flag and item.weighted
            ]
        loss_sum = loss.item() / row_weight
        return RankStep(sums, loss_sum, grad_norm, flawed, stream.nbytes, stream.fetched, stream.waited, bias)

    def evaluate(self, work: Sequence[MicroBatchWork], divergences: Sequence[tuple[str, Divergence]]) -> np.ndarray:
        """Sums of divergences over each sample's sampled tokens, without gradient; collective.

        Returns:
            float64 [samples, divergences] in nats, samples in the order of the weighted work.

        Raises:
            SignalLostError, NonFiniteError: on all ranks.
        """
        self.engine.eval()
        sums = [np.zeros((0, len(divergences)))]
        lost: str | None = None
        stream = signal_stream(work)
        with torch.no_grad():
            for item, signals in zip(work, stream, strict=True):
                tokens = pack(item.samples).to(self.device)
                if not item.weighted or (signals is not None and signals.error is not None):
                    lost = lost or (signals.error if signals is not None else None)
                    self.engine(tokens)
                    continue
                teacher = self._teacher_rows(item.samples, signals)
                values = self.engine(tokens, teacher, evaluate=divergences)
                sums.append(sample_sums(item.samples, torch.stack([values[name] for name, _ in divergences])))
                lost = lost or self._hidden_flaw(item.samples, sums[-1])
        if self.spec.loss.objective is Objective.grpo:
            # Training asks no teacher: only an evaluation, now and then, needs them.
            self.teacher_heads.clear()
        self._raise_together(lost)
        return np.concatenate(sums)

    def teacher_log_probs(self, work: Sequence[MicroBatchWork]) -> list[np.ndarray]:
        """Log-prob of each sampled token as its signal gives it, of each sample of the weighted work; collective.

        See :meth:`s2w.learner.group.LearnerGroup.teacher_log_probs`.
        """
        result: list[np.ndarray] = []
        lost: str | None = None
        stream = signal_stream(work)
        for item, signals in zip(work, stream, strict=True):
            if signals is None or signals.error is not None:
                lost = lost or (signals.error if signals is not None else None)
                continue
            ids, _ = self._sampled(item.samples)
            teacher = self._teacher_rows(item.samples, signals)
            assert teacher is not None
            values = log_probs_at(teacher, ids, self.spec.vocab_size, self.spec.loss.chunk_rows)
            counts = [len(sample.rollout.sampled_rows) for sample in item.samples]
            result += [part.numpy() for part in values.float().cpu().split(counts)]
            lost = lost or self._hidden_flaw(item.samples, sample_sums(item.samples, values[None]))
        self._raise_together(lost)
        return result

    def probe(self, token_ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Log-prob of each token but the first, given those before it; collective.

        Returns:
            float32 [len(token_ids) - 1], in nats.
        """
        self.engine.eval()
        ids = torch.from_numpy(np.asarray(token_ids, np.int64))
        tokens = Tokens(ids[None, :-1], torch.arange(len(ids) - 1), ids[1:]).to(self.device)
        with torch.no_grad():
            return self.engine(tokens, log_probs_at=temperature)["log_probs"].float().cpu().numpy()

    def named_full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole weight of each of the student's parameters, gathered one at a time; collective.

        Names and order are those of transformers' ``named_parameters``: tied weights once. A tensor is valid until
        the next one is asked for, so at ZeRO stage 3 the model is never whole.
        """
        for name, parameter in self.lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, parameter.data

    def send_weights(self, step: str, *args: Any) -> Any:
        """Calls a method of this rank's :class:`s2w.weights.transfer.Transfer`; collective."""
        return getattr(self.transfer, step)(*args)

    def save(self, directory: Path) -> None:
        """Writes this rank's part of a checkpoint; rank 0 writes the Hugging Face model; collective."""
        state = directory / checkpoint.OPTIMIZER_DIR
        self.engine.save_checkpoint(str(state), tag=_RANKS, save_latest=False)
        torch.save(self._rng_state(), state / _RANKS / f"rng_{self.rank:05d}.pt")
        stream = CheckpointStream(self.lm, self.named_full_parameters, self.lm.dtype)
        if self.rank != 0:
            stream.drain()
            return
        buffers = (
            (name, tensor)
            for name, tensor in self.lm.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter)
        )
        checkpoint.write_weights(directory, chain(stream, buffers))
        checkpoint.write_texts(directory, self.lm, self.student_path, self.spec.chat_template)

    def load(self, directory: Path) -> None:
        """Continues from a checkpoint; before the first step, since DeepSpeed loads only into a fresh engine;
        collective."""
        state = directory / checkpoint.OPTIMIZER_DIR
        path, _ = self.engine.load_checkpoint(str(state), tag=_RANKS)
        if path is None:
            raise FileNotFoundError(f"{directory} has no optimizer state")
        rng = torch.load(state / _RANKS / f"rng_{self.rank:05d}.pt")
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"])

    def _teacher_rows(self, samples: Sequence[Scored], signals: Fetched | None) -> TeacherRows | None:
        """What the teacher says, or stands for, at the sampled tokens; None where only rewards count."""
        if signals is None:
            cross_entropy = self.spec.loss.objective is Objective.cross_entropy
            return SparseRows.certain(self._sampled(samples)[0]) if cross_entropy else None
        parts = [
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()} for part in signals.parts
        ]
        if self.spec.signal == "hidden":
            assert samples[0].signal is not None
            hidden = HiddenParts(parts, getattr(torch, self.spec.dtype))
            return HiddenRows(hidden, self._teacher_head(samples[0].signal.name))
        signal = joined(parts)
        match self.spec.signal:
            case "topk" | "ids":
                return SparseRows(signal["ids"].long(), signal["log_probs"], signal["log_tail"])
            case "sampled":
                ids, log_probs = self._sampled(samples)
                return SampledRows(
                    ids,
                    signal["log_probs"],
                    log_probs,
                    importance_limit=self.spec.loss.importance_limit,
                    discount=self.spec.loss.discount,
                    sequence_ids=self._rows(samples, range(len(samples))),
                )

    def _teacher_head(self, name: str) -> Head:
        """A teacher's head, in the dtype of the products; read when it is first asked for."""
        if name not in self.teacher_heads:
            reference, revision = self.spec.teachers[name]
            head = load_head(reference, revision)
            place = {"device": self.device, "dtype": getattr(torch, self.spec.dtype)}
            bias = None if head.bias is None else head.bias.to(**place)
            self.teacher_heads[name] = Head(head.weight.to(**place), bias, head.softcap, head.scale)
        return self.teacher_heads[name]

    def _policy_rows(self, samples: Sequence[Scored], row_weight: float) -> PolicyRows | None:
        """The policy gradient's rows; None where there is none."""
        if not (weight := self.spec.reward_weight):
            return None
        ids, log_probs = self._sampled(samples)
        return PolicyRows(
            ids,
            self._rows(samples, [sample.advantage for sample in samples]),
            log_probs,
            torch.full_like(log_probs, weight * row_weight),
            (self.spec.reward.clip_low, self.spec.reward.clip_high),
        )

    def _sampled(self, samples: Sequence[Scored]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sampled tokens, int64 [N], and their log-probs when they were sampled, float32 [N]."""
        rollouts = [sample.rollout for sample in samples]
        ids = np.concatenate([rollout.token_ids[rollout.sampled_rows] for rollout in rollouts])
        log_probs = np.concatenate([rollout.log_probs[rollout.sampled_rows] for rollout in rollouts])
        return torch.from_numpy(ids).long().to(self.device), torch.from_numpy(log_probs).to(self.device)

    def _rows(self, samples: Sequence[Scored], values: Sequence[float]) -> torch.Tensor:
        """A value of each sample at each of its sampled tokens, float32 [N]."""
        counts = [len(sample.rollout.sampled_rows) for sample in samples]
        return torch.from_numpy(np.repeat(np.asarray(values, np.float32), counts)).to(self.device)

    def _agree_to_go_on(
        self, step: int, weighted: Sequence[MicroBatchWork], sums: np.ndarray, lost: str | None
    ) -> None:
        """Raises on all ranks if one of them cannot go on, after dropping the gradients."""
        samples = [(item, sample) for item in weighted for sample in item.samples]
        bad = [
            (item, sample)
            for (item, sample), row in zip(samples, sums, strict=False)
            if not np.isfinite(row[STATISTICS.index("values")])
        ]
        message = lost
        if lost is None and bad:
            item = bad[0][0]
            path = self.spec.run_dir / "nonfinite" / f"step_{step:06d}_rank{self.rank}.pt"
            because = first_flaw(sample for _, sample in bad if sample.signal)
            uids = ", ".join(sample.rollout.uid for _, sample in bad)
            message = f"step {step}: divergence of {uids} is not finite{f' ({because})' if because else ''}, see {path}"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {
                    "uids": [s.rollout.uid for s in item.samples],
                    "prompts": [s.rollout.prompt.token_ids for s in item.samples],
                    "responses": [s.rollout.token_ids for s in item.samples],
                    "signals": fetch(item.samples).parts if item.samples[0].signal else [],
                },
                path,
            )
        try:
            self._raise_together(message)
        except StepRefusedError:
            self._drop_gradients()
            raise

    def _hidden_flaw(self, samples: Sequence[Scored], sums: np.ndarray) -> str | None:
        """What is wrong with the hidden rows of the first sample whose ``sums`` are not finite.

        Signals of other kinds are checked where they are made, and leave NaN what they cannot know.
        """
        if self.spec.signal != "hidden":
            return None
        return first_flaw(s for s, row in zip(samples, sums, strict=True) if not np.isfinite(row).all())

    def _raise_together(self, message: str | None) -> None:
        """Raises the messages of all ranks on every rank; one small all-reduce if there are none."""
        flag = torch.tensor(message is not None, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flag, ReduceOp.MAX)
        if not flag.item():
            return
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, message)
        errors = [m for m in gathered if m is not None]
        raise (NonFiniteError if any("not finite" in e for e in errors) else SignalLostError)("; ".join(errors))

    def _drop_gradients(self) -> None:
        """Forgets what the backward passes of an unfinished step accumulated."""
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()
        if self.spec.learner.zero_stage == 2:
            # Stage 2 keeps the reduced gradients of its partition outside the parameters.
            self.engine.optimizer.averaged_gradients.clear()
            self.engine.optimizer.all_grad_tensors.clear()

    def _clip_unsharded(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Stage 0 in float32 has no optimizer wrapper, and DeepSpeed keeps no norm there: clip here."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.spec.learner.max_grad_norm or float("inf")
        self.unsharded_grad_norm = nn.utils.clip_grad_norm_(parameters, limit).item()
        if not np.isfinite(self.unsharded_grad_norm):
            # As DeepSpeed does at the other stages, the step is left out: AdamW passes over what has no gradient.
            optimizer.zero_grad()

    def _rng_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        return state


def deepspeed_settings(learner: LearnerConfig, dtype: str, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration: gradients accumulate over any number of micro-batches, in float32.

    Raises:
        ValueError: bfloat16 at stage 0, where DeepSpeed would accumulate gradients in bfloat16.
    """
    if learner.zero_stage == 0 and dtype == "bfloat16":
        raise ValueError("learner.zero_stage=0 with bfloat16 would accumulate gradients in bfloat16: use stage 1")
    return {
        # Micro-batches differ in size and number: the learner scales the loss and ends the accumulation itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        "gradient_clipping": learner.max_grad_norm if learner.zero_stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS[device],
            "overlap_comm": device == "cuda" and learner.zero_stage >= 2,
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def norm_in_pieces(optimizer: Any) -> None:
    """Has DeepSpeed's ZeRO optimizer take the gradient's norm in pieces of ``NORM_ELEMENTS``.

    It casts each gradient to float64: of an embedding of 151,936 x 4,096 that would be 5 GB.
    """
    whole = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients: Sequence[torch.Tensor], params: Sequence[nn.Parameter], *args: Any) -> Any:
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pairs = [
            (piece, parameter)
            for gradient, parameter in zip(real, params, strict=False)
            for piece in gradient.flatten().split(NORM_ELEMENTS)
        ]
        return whole([piece for piece, _ in pairs], [parameter for _, parameter in pairs], *args)

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay, norms and biases do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        # A sharded parameter is flat; DeepSpeed keeps its shape beside it.
        groups[len(getattr(parameter, "ds_shape", parameter.shape)) > 1].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def pack(samples: Sequence[Scored]) -> Tokens:
    """Right-pads samples; row i of a response, unless it was forced, is predicted at position prompt_len - 1 + i."""
    lengths = [sequence_length(sample) for sample in samples]
    longest = max(lengths)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    rows, targets = [], []
    for i, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[i, :length] = torch.from_numpy(sample.rollout.input_ids[:length].astype(np.int64))
        sampled = sample.rollout.sampled_rows
        rows.append(i * longest + len(sample.rollout.prompt.token_ids) - 1 + sampled)
        targets.append(sample.rollout.token_ids[sampled].astype(np.int64))
    return Tokens(input_ids, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(targets)))


def signal_stream(work: Sequence[MicroBatchWork]) -> SignalStream:
    """The signals of the micro-batches that have them and count."""
    wanted = [item.samples if item.weighted and item.samples[0].signal else None for item in work]
    return SignalStream(wanted)


@torch.no_grad()
def log_probs_at(teacher: TeacherRows, ids: torch.Tensor, vocab_size: int, chunk_rows: int) -> torch.Tensor:
    """What ``teacher`` says of the tokens ``ids`` (int64 [N]): [N] nats, NaN where it says nothing.

    Args:
        vocab_size: tokens of the vocabulary.
        chunk_rows: most rows of a [rows, vocabulary] buffer.
    """
    if isinstance(teacher, SampledRows):
        return teacher.log_probs
    if isinstance(teacher, SparseRows):
        there = teacher.ids == ids[:, None]
        values = torch.where(there, teacher.log_probs, -torch.inf).amax(-1)
        return values.masked_fill(~there.any(-1), torch.nan)
    head = teacher.head.cut(vocab_size)
    chunks = [slice(start, start + chunk_rows) for start in range(0, len(ids), chunk_rows)]
    return torch.cat(
        [head.logits(teacher.hidden[rows]).log_softmax(-1).gather(-1, ids[rows, None])[:, 0] for rows in chunks]
    )


def sample_sums(samples: Sequence[Scored], statistics: torch.Tensor) -> np.ndarray:
    """Sums over each sample's sampled tokens, float64 [samples, k], of ``statistics`` [k, all of them in order]."""
    starts = np.cumsum([0, *(len(sample.rollout.sampled_rows) for sample in samples)])[:-1]
    return np.add.reduceat(statistics.double().cpu().numpy(), starts, axis=1).T
