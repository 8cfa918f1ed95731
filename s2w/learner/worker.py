"""One rank of the learner: a Ray actor that holds a DeepSpeed engine."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import ray
import torch
from deepspeed.utils.logging import set_log_level_from_string
from torch import nn
from torch.distributed import ReduceOp

from s2w.actors import bars, stages
from s2w.actors.hardware import core_count
from s2w.actors.stages import Stage
from s2w.learner import checkpoint
from s2w.learner.deepspeed_settings import deepspeed_settings
from s2w.learner.messages import (
    MicroBatchWork,
    NonFiniteError,
    RankSpec,
    RankStep,
    SignalLostError,
    StepRefusedError,
    sequence_length,
)
from s2w.learner.metrics import DIVERGENCE
from s2w.learner.signal_bias import SignalSums
from s2w.learner.signal_fetch import Fetched, HiddenParts, SignalStream, fetch, first_flaw, joined
from s2w.learner.student_model import StudentModel, Tokens, load_student
from s2w.models.head import Head, load_head
from s2w.models.shards import write_weights
from s2w.objectives import TokenBatch, TokenLoss
from s2w.objectives.divergences import Divergence, divergence_of
from s2w.objectives.kernel import HiddenRows, SampledRows, SparseRows, TeacherRows
from s2w.records import Scored
from s2w.teacher.routing import REFERENCE
from s2w.weights.backends import backend_of
from s2w.weights.stream import CheckpointStream
from s2w.weights.transfer import TRANSFERS, Update

_RANKS = "ranks"
"""DeepSpeed's tag: the directory with the files of every rank."""

NORM_ELEMENTS = 1 << 20
"""Gradient elements of which the norm is taken at once, in float64."""


class LearnerRank:
    """A DeepSpeed rank. Methods marked *collective* must be called on all ranks at once, in the same order.

    Memory (`benchmarks/memory.py`): at ZeRO stage 2 in bfloat16 18 bytes per parameter (weights 2, float32 master copy
    4, moments 8, float32 gradients 4; of all but the weights a rank has its share), and these buffers, for V tokens
    and widths d (student) and d_t (teacher), b bytes per element:

    - activations, and for the loss two [chunk_rows, V] products;
    - gradient of the head: (4 + b) V d while the loss is computed, then b V d, twice if it is also the embedding's;
    - gradients on their way to other ranks: (4 + b) bytes per element of the largest parameter, 8 x BUCKET_ELEMENTS;
    - b V d_t for each teacher's head, which is the file's own page cache where the checkpoint has the dtype;
    - on the CPU, from the first swap on, a copy of the weights in the engines' dtype (rank 0);
    - for a checkpoint, a shard of at most 5 GiB (rank 0).

    In float32 it is 20 at stage 0 (16, and the flat copy in which DeepSpeed reduces gradients) and 21 at stage 2.

    Args:
        rank: its number among the ``world`` ranks.
        verbose: DeepSpeed logs at level INFO.
    """

    def __init__(self, rank: int, world: int, verbose: bool = False) -> None:
        stages.open_board()
        bars.report()
        set_log_level_from_string("info" if verbose else "warning")
        self.rank, self.world = rank, world
        # Set by build, which every later call needs.
        self.engine: Any = None
        self.lm: Any = None
        self.transfer: Any = None

    def stage(self) -> Stage:
        """What it does while it starts; see :mod:`s2w.actors.starting`."""
        return stages.current()

    def place(self) -> tuple[str, str, int, int]:
        """Node id, address of the node, a free port, cores that this process may use."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port, core_count()

    def connect(self, address: str, port: int, device: str, threads: int) -> None:
        """Joins the process group; collective.

        Args:
            address: rank 0's.
            threads: for this rank's CPU kernels.
        """
        stages.enter("joining the process group")
        torch.set_num_threads(threads)
        # Ray shows a rank only its own GPU.
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
        stages.enter("loading weights")
        zero3 = settings if learner.zero_stage == 3 else None
        self.lm = load_student(self.student_path, getattr(torch, spec.dtype), learner.attention, zero3)
        if learner.activation_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        model = StudentModel(self.lm, spec.loss, divergence_of(spec.loss), spec.vocab_size)

        stages.enter("building the optimizer")
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
        if spec.signal == "hidden" and spec.objective.signals:
            for name in spec.teachers:
                stages.enter(f"loading the head of {name}")
                self._teacher_head(name)
        stream = CheckpointStream(self.lm, self.named_full_parameters, getattr(torch, spec.engine_dtype))
        self.transfer = TRANSFERS[backend_of(spec.device, learner.gpus)](stream, self.rank)
        stages.enter(stages.UP)

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
        they are: every token has the same weight, apart from ``Scored.weight``, and a long response counts for more
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
        token_weight = self.world / global_tokens
        loss_sum = torch.zeros((), device=self.device)
        metrics: list[dict[str, torch.Tensor]] = []
        bias: dict[str, SignalSums] = {}
        refusal: StepRefusedError | None = None
        for item, signals in zip(work, stream, strict=True):
            tokens = pack(item.samples).to(self.device)
            if signals is not None and signals.error is not None:
                refusal = refusal or SignalLostError(signals.error)
            if not item.weighted or (signals is not None and signals.error is not None):
                output = self.engine(tokens)
            else:
                loss = self.spec.objective.loss(self._token_batch(item.samples, signals, token_weight))
                output = self.engine(tokens, loss, measure_bias=measure_bias and not metrics)
                bias |= output.get("signal_bias", {})
                loss_sum += output["loss"].detach()
                metrics.append(output["metrics"])
            self.engine.backward(output["loss"], scale_wrt_gas=False)

        weighted = [item for item in work if item.weighted]
        sums: dict[str, np.ndarray] = {}
        if refusal is None and weighted:
            samples = [sample for item in weighted for sample in item.samples]
            # A metric of the objective's may be there only where it has something to say.
            names = dict.fromkeys(name for one in metrics for name in one)
            sums = {
                name: sample_sums(
                    samples, torch.cat([one.get(name, torch.zeros_like(one[DIVERGENCE.name])) for one in metrics])
                )
                for name in names
            }
            refusal = self._non_finite(step, weighted, sums[DIVERGENCE.name])
        try:
            self._raise_together(refusal)
        except StepRefusedError:
            self._drop_gradients()
            raise

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
        total = loss_sum.item() / token_weight
        return RankStep(sums, total, grad_norm, flawed, stream.nbytes, stream.fetched, stream.waited, bias)

    def evaluate(self, work: Sequence[MicroBatchWork], divergences: Sequence[tuple[str, Divergence]]) -> np.ndarray:
        """Sums of divergences over each sample's sampled tokens, without gradient; collective.

        Returns:
            float64 [samples, divergences] in nats, samples in the order of the weighted work.

        Raises:
            SignalLostError, NonFiniteError: on all ranks.
        """
        self.engine.eval()
        sums = [np.zeros((0, len(divergences)))]
        refusal: StepRefusedError | None = None
        stream = signal_stream(work)
        with torch.no_grad():
            for item, signals in zip(work, stream, strict=True):
                tokens = pack(item.samples).to(self.device)
                if signals is not None and signals.error is not None:
                    refusal = refusal or SignalLostError(signals.error)
                if not item.weighted or (signals is not None and signals.error is not None):
                    self.engine(tokens)
                    continue
                batch = self._token_batch(item.samples, signals, 1.0)
                loss = TokenLoss(batch.teacher) if batch.teacher else self.spec.objective.loss(batch)
                values = self.engine(tokens, loss, evaluate=divergences)
                columns = [sample_sums(item.samples, values[name]) for name, _ in divergences]
                sums.append(np.stack(columns, 1))
                refusal = refusal or self._hidden_flaw(item.samples, sums[-1])
        if not self.spec.objective.signals:
            # Training needs no teacher: only an occasional evaluation needs the heads.
            self.teacher_heads.clear()
        self._raise_together(refusal)
        return np.concatenate(sums)

    def teacher_log_probs(self, work: Sequence[MicroBatchWork]) -> list[np.ndarray]:
        """Log-probs of the sampled tokens decoded from the signals, for each sample of the weighted work; collective.

        See :meth:`s2w.learner.group.LearnerGroup.teacher_log_probs`.
        """
        result: list[np.ndarray] = []
        refusal: StepRefusedError | None = None
        for item, signals in zip(work, signal_stream(work), strict=True):
            if signals is None:
                continue
            if signals.error is not None:
                refusal = refusal or SignalLostError(signals.error)
                continue
            batch = self._token_batch(item.samples, signals, 1.0)
            assert batch.teacher is not None
            values = decoded_log_probs(batch.teacher, batch.ids, self.spec.vocab_size, self.spec.loss.chunk_rows)
            result += [part.numpy() for part in values.float().cpu().split(batch.counts)]
            refusal = refusal or self._hidden_flaw(item.samples, sample_sums(item.samples, values)[:, None])
        self._raise_together(refusal)
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
        """Name and full weight of each of the student's parameters, gathered one at a time; collective.

        Names and order are those of transformers' ``named_parameters``: tied weights once. A tensor is valid until
        the next one is asked for, so at ZeRO stage 3 the model is never whole.
        """
        for name, parameter in self.lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, parameter.data

    def prepare_weights(self, workers: dict[int, int]) -> Update | None:
        """:meth:`s2w.weights.transfer.Transfer.prepare` of this rank; collective."""
        return self.transfer.prepare(workers)

    def connect_weights(self) -> None:
        """:meth:`s2w.weights.transfer.Transfer.connect` of this rank; collective."""
        self.transfer.connect()

    def send_weights(self) -> None:
        """:meth:`s2w.weights.transfer.Transfer.send` of this rank; collective."""
        self.transfer.send()

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
        write_weights(directory, chain(stream, buffers))
        checkpoint.write_texts(directory, self.lm, self.student_path)

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

    def _token_batch(self, samples: Sequence[Scored], signals: Fetched | None, token_weight: float) -> TokenBatch:
        """The sampled tokens of a micro-batch, with its signals at them."""
        rollouts = [sample.rollout for sample in samples]
        ids = np.concatenate([rollout.token_ids[rollout.sampled_rows] for rollout in rollouts])
        log_probs = np.concatenate([rollout.log_probs[rollout.sampled_rows] for rollout in rollouts])
        batch = TokenBatch(
            samples=samples,
            ids=torch.from_numpy(ids).long().to(self.device),
            log_probs=torch.from_numpy(log_probs).to(self.device),
            teacher=None,
            reference=None,
            teacher_log_probs=None,
            token_weight=token_weight,
        )
        if signals is None:
            return batch
        teacher, reference = self._on_device(signals.parts), self._on_device(signals.reference)
        names = [samples[0].signal.name if samples[0].signal else "", REFERENCE]
        return replace(
            batch,
            teacher=self._teacher_rows(batch, teacher, names[0]) if teacher else None,
            reference=self._teacher_rows(batch, reference, names[1]) if reference else None,
            teacher_log_probs=sampled_log_probs(teacher) if self.spec.objective.teacher_log_probs and teacher else None,
        )

    def _on_device(self, parts: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [{name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()} for part in parts]

    def _teacher_rows(self, batch: TokenBatch, parts: Sequence[dict[str, torch.Tensor]], name: str) -> TeacherRows:
        """The signal of the teacher ``name`` at the sampled tokens."""
        if self.spec.signal == "hidden":
            return HiddenRows(HiddenParts(parts, getattr(torch, self.spec.dtype)), self._teacher_head(name))
        signal = joined(parts)
        if self.spec.signal == "sampled":
            return SampledRows(
                batch.ids,
                signal["log_probs"],
                batch.log_probs,
                importance_limit=self.spec.loss.importance_limit,
                discount=self.spec.loss.discount,
                sequence_ids=batch.each(range(len(batch.samples))),
            )
        return SparseRows(signal["ids"].long(), signal["log_probs"], signal["log_tail"])

    def _teacher_head(self, name: str) -> Head:
        """A teacher's head, in the dtype of the matrix products; read on first use."""
        if name not in self.teacher_heads:
            head = load_head(*self.spec.teachers[name])
            self.teacher_heads[name] = head.to(self.device, getattr(torch, self.spec.dtype))
        return self.teacher_heads[name]

    def _non_finite(self, step: int, weighted: Sequence[MicroBatchWork], sums: np.ndarray) -> NonFiniteError | None:
        """Why the step cannot be done, if a sample's divergence is not finite; writes its micro-batch to a file."""
        samples = [(item, sample) for item in weighted for sample in item.samples]
        bad = [pair for pair, value in zip(samples, sums, strict=True) if not np.isfinite(value)]
        if not bad:
            return None
        item = bad[0][0]
        path = self.spec.run_dir / "nonfinite" / f"step_{step:06d}_rank{self.rank}.pt"
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
        because = first_flaw(sample for _, sample in bad if sample.signal)
        uids = ", ".join(sample.rollout.uid for _, sample in bad)
        return NonFiniteError(
            f"step {step}: divergence of {uids} is not finite{f' ({because})' if because else ''}, see {path}"
        )

    def _hidden_flaw(self, samples: Sequence[Scored], sums: np.ndarray) -> StepRefusedError | None:
        """What is wrong with the hidden states of the first sample whose ``sums`` [samples, k] are not finite.

        Signals of other kinds are checked where they are made, and have NaN for what they cannot know.
        """
        if self.spec.signal != "hidden":
            return None
        flaw = first_flaw(s for s, row in zip(samples, sums, strict=True) if not np.isfinite(row).all())
        return NonFiniteError(flaw) if flaw else None

    def _raise_together(self, refusal: StepRefusedError | None) -> None:
        """Raises the refusals of all ranks on every rank, as one; one small all-reduce if there are none."""
        flag = torch.tensor(refusal is not None, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(flag, ReduceOp.MAX)
        if not flag.item():
            return
        gathered: list[StepRefusedError | None] = [None] * self.world
        torch.distributed.all_gather_object(gathered, refusal)
        refusals = [one for one in gathered if one is not None]
        kind = NonFiniteError if any(isinstance(one, NonFiniteError) for one in refusals) else SignalLostError
        raise kind("; ".join(map(str, refusals)))

    def _drop_gradients(self) -> None:
        """Drops what the backward passes of an unfinished step accumulated."""
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
            # As DeepSpeed does at the other stages, the step is skipped: AdamW skips what has no gradient.
            optimizer.zero_grad()

    def _rng_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        return state


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
    """Right-pads samples; token i of a response, unless it was forced, is predicted at position prompt_len - 1 + i."""
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


def sampled_log_probs(parts: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """float32 [N]: the teacher's log-probs of the sampled tokens, which an objective has asked for."""
    name = "sampled" if "sampled" in parts[0] else "log_probs"
    return torch.cat([part[name] for part in parts])


@torch.no_grad()
def decoded_log_probs(teacher: TeacherRows, ids: torch.Tensor, vocab_size: int, chunk_rows: int) -> torch.Tensor:
    """``teacher``'s log-probs of the tokens ``ids`` (int64 [N]): [N] nats, NaN where it gives none.

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


def sample_sums(samples: Sequence[Scored], values: torch.Tensor) -> np.ndarray:
    """Sums over each sample's sampled tokens, float64 [samples], of ``values`` [all of them in order]."""
    starts = np.cumsum([0, *(len(sample.rollout.sampled_rows) for sample in samples)])[:-1]
    return np.add.reduceat(values.double().cpu().numpy(), starts)
