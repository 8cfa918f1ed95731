"""The module that DeepSpeed wraps: student trunk, teacher rows and loss in one forward.

The loss needs the output embedding's weight. At ZeRO stage 3 that is whole only inside the forward of a module that
has declared it, so the loss is here and not after the engine's call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from s2w.config import LossConfig
from s2w.learner.divergence import Divergence
from s2w.learner.fused_kl import (
    Head,
    HiddenRows,
    PolicyRows,
    SampledRows,
    TeacherRows,
    divergence_loss,
    divergence_values,
)
from s2w.learner.signal_bias import signal_bias
from s2w.teacher.head import logit_scale


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token tensors of one micro-batch, right-padded.

    No attention mask: attention is causal and padding comes last, so no real token attends to it.
    """

    input_ids: torch.Tensor
    """int64 [samples, longest]; the last response token of a sample is left out, nothing is predicted from it."""
    rows: torch.Tensor
    """int64 [N]: positions in the flattened [samples * longest] whose hidden rows predict the response tokens."""
    targets: torch.Tensor
    """int64 [N]: the response tokens."""

    def to(self, device: torch.device) -> Tokens:
        return Tokens(*(t.to(device, non_blocking=True) for t in (self.input_ids, self.rows, self.targets)))


class StudentModel(nn.Module):
    """A causal language model whose forward returns a loss and statistics instead of logits."""

    def __init__(self, lm: PreTrainedModel, loss: LossConfig, divergence: Divergence, vocab_size: int) -> None:
        """``vocab_size``: ids that student and teacher share; logits of further (padding) rows are left out."""
        super().__init__()
        self.lm = lm
        self.loss = loss
        self.divergence = divergence
        self.vocab_size = vocab_size
        self.flawed: list[torch.Tensor] = []
        """Of each backward pass so far, bool [samples]: whose gradient is not finite."""
        lm.get_input_embeddings().register_forward_hook(self._watch_gradient)
        embedding = lm.get_output_embeddings()
        for parameter in embedding.parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def _watch_gradient(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Notes which samples' gradients are not finite where a backward pass ends: what goes wrong on the way gets
        there."""
        if output.requires_grad:
            output.register_hook(lambda grad: self.flawed.append(~grad.isfinite().flatten(1).all(1)))

    @property
    def head(self) -> Head:
        """Output embedding with the logit scale and softcap of the model's configuration; valid inside forward."""
        embedding = self.lm.get_output_embeddings()
        config = self.lm.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(embedding.weight, getattr(embedding, "bias", None), softcap, logit_scale(config))

    def forward(
        self,
        tokens: Tokens,
        teacher: TeacherRows | None = None,
        weights: torch.Tensor | None = None,
        policy: PolicyRows | None = None,
        evaluate: Sequence[tuple[str, Divergence]] = (),
        log_probs_at: float | None = None,
        measure_bias: bool = False,
    ) -> dict[str, Any]:
        """Runs the student over a micro-batch.

        Args:
            teacher: the teacher's rows, [N].
            weights: [N] of the rows in the divergence's sum, 1 if None.
            policy: a policy gradient to add; without ``teacher`` it is the whole loss.
            evaluate: names and divergences to compute without gradient, in place of the training loss.
            log_probs_at: return the log-probs of ``targets`` at this temperature instead.
            measure_bias: training with HiddenRows: add ``signal_bias``, see
                :func:`s2w.learner.signal_bias.signal_bias`.

        Returns:
            Training: ``loss``, a scalar, the weighted sum over the N rows, and float32 [N] ``values``,
            ``student_entropy``, ``teacher_entropy``, ``agreement``, see
            :class:`~s2w.learner.fused_kl.DivergenceOutput`.
            ``evaluate``: float32 [N] by name, at the temperature of the loss. Signal ``sampled`` can only estimate
            ``reverse_kl``; the others are NaN.
            ``log_probs_at``: float32 [N] ``log_probs``, in nats.
            Neither ``teacher`` nor ``policy``: a ``loss`` of exactly 0 that depends on every weight, for a rank that
            only keeps in step.
        """
        hidden = self.lm.base_model(input_ids=tokens.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, tokens.rows)
        head = self.head
        if log_probs_at is not None:
            log_q = (head.cut(self.vocab_size).logits(hidden) / log_probs_at).log_softmax(-1)
            return {"log_probs": log_q.gather(-1, tokens.targets[:, None])[:, 0]}
        if teacher is None and policy is None:
            parameters = self.lm.get_output_embeddings().parameters()
            return {"loss": 0.0 * (hidden[:1].sum() + sum(p.flatten()[:1].sum() for p in parameters))}
        options: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "temperature": self.loss.temperature,
            "chunk_rows": self.loss.chunk_rows,
        }
        if evaluate and teacher is not None and not isinstance(teacher, SampledRows):
            return divergence_values(hidden, head, teacher, evaluate, **options)
        output = divergence_loss(
            hidden,
            head,
            teacher,
            self.divergence,
            policy=policy,
            weights=weights,
            temperature_squared=self.loss.temperature_squared,
            **options,
        )
        if evaluate:
            unknown = torch.full_like(output.values, torch.nan)
            return {name: output.values if name == "reverse_kl" else unknown for name, _ in evaluate}
        result: dict[str, Any] = {
            "loss": output.loss,
            "values": output.values,
            "student_entropy": output.student_entropy,
            "teacher_entropy": output.teacher_entropy,
            "agreement": output.agreement,
        }
        if measure_bias and isinstance(teacher, HiddenRows):
            # Here because the head is whole only here, at ZeRO stage 3.
            result["signal_bias"] = signal_bias(
                hidden, head, teacher, self.divergence, sampled_ids=tokens.targets, **options
            )
        return result


def load_student(path: Path, dtype: torch.dtype, attention: str, zero3: dict[str, Any] | None) -> PreTrainedModel:
    """Loads the student on the CPU, ready to be wrapped.

    Args:
        path: directory of the checkpoint.
        attention: transformers' ``attn_implementation``.
        zero3: DeepSpeed's configuration at stage 3, else None. The model is then born sharded, and rank 0 alone
            reads the checkpoint and deals it out parameter by parameter; a collective.
    """
    source: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if zero3 is None:
        return AutoModelForCausalLM.from_pretrained(path, **source)

    rank = torch.distributed.get_rank()
    whole = AutoModelForCausalLM.from_pretrained(path, **source) if rank == 0 else None
    config = AutoConfig.from_pretrained(path)
    # No override of dtypes: it would round the float32 buffers of the rotary embedding.
    overrides = [deepspeed.zero.DeepSpeedTensorOverride.device]
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=zero3, dtype=dtype, tensor_overrides=overrides):
        model = AutoModelForCausalLM.from_config(config, **source)
    model.tie_weights()
    weights = whole.state_dict() if whole is not None else {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0), torch.no_grad():
                if rank == 0:
                    tensor.copy_(weights[name])
        else:
            if rank == 0:
                tensor.copy_(weights[name])
            torch.distributed.broadcast(tensor, 0)
    if whole is not None:
        model.generation_config = whole.generation_config
    return model
