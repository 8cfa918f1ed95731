"""The module that DeepSpeed wraps: student trunk, teacher signal and loss in one forward.

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

from s2w.actors import stages
from s2w.config.schema import LossConfig
from s2w.learner.metrics import AGREEMENT, DIVERGENCE, REFERENCE_KL, STUDENT_ENTROPY, TEACHER_ENTROPY
from s2w.learner.signal_bias import signal_bias
from s2w.models.head import Head, head_of
from s2w.objectives import TokenLoss
from s2w.objectives.divergences import Divergence, ReverseKL
from s2w.objectives.kernel import (
    HiddenRows,
    SampledRows,
    divergence_loss,
    divergence_values,
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token tensors of one micro-batch, right-padded.

    No attention mask: attention is causal and padding comes last, so no real token attends to it.
    """

    input_ids: torch.Tensor
    """int64 [samples, longest]; the last response token of a sample is left out, nothing is predicted from it."""
    rows: torch.Tensor
    """int64 [N]: positions in the flattened [samples * longest] whose hidden states predict the response tokens."""
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
        """For each backward pass so far, bool [samples]: whose gradient is not finite."""
        lm.get_input_embeddings().register_forward_hook(self._watch_gradient)
        embedding = lm.get_output_embeddings()
        for parameter in embedding.parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def _watch_gradient(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Notes which samples' gradients are not finite at the end of a backward pass: what goes wrong on the way shows
        there."""
        if output.requires_grad:
            output.register_hook(lambda grad: self.flawed.append(~grad.isfinite().flatten(1).all(1)))

    @property
    def head(self) -> Head:
        """Output embedding with the logit scale and softcap of the model's configuration; valid inside forward."""
        return head_of(self.lm)

    def forward(
        self,
        tokens: Tokens,
        loss: TokenLoss | None = None,
        evaluate: Sequence[tuple[str, Divergence]] = (),
        log_probs_at: float | None = None,
        measure_bias: bool = False,
    ) -> dict[str, Any]:
        """Runs the student over a micro-batch.

        Args:
            loss: what is minimised at the N tokens.
            evaluate: names and divergences to compute without gradient, in place of the training loss.
            log_probs_at: return the log-probs of ``targets`` at this temperature instead.
            measure_bias: training with HiddenRows: add ``signal_bias``, see
                :func:`s2w.learner.signal_bias.signal_bias`.

        Returns:
            Training: ``loss``, a scalar, the weighted sum over the N tokens, and ``metrics``, float32 [N] by name.
            ``evaluate``: float32 [N] by name, at the temperature of the loss. Signal ``sampled`` can only estimate
            ``reverse_kl``; the others are NaN.
            ``log_probs_at``: float32 [N] ``log_probs``, in nats.
            No loss: a ``loss`` of exactly 0 that depends on every weight, for a rank that only keeps in step.
        """
        hidden = self.lm.base_model(input_ids=tokens.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, tokens.rows)
        head = self.head
        if log_probs_at is not None:
            log_q = (head.cut(self.vocab_size).logits(hidden) / log_probs_at).log_softmax(-1)
            return {"log_probs": log_q.gather(-1, tokens.targets[:, None])[:, 0]}
        if loss is None:
            parameters = self.lm.get_output_embeddings().parameters()
            return {"loss": 0.0 * (hidden[:1].sum() + sum(p.flatten()[:1].sum() for p in parameters))}
        if evaluate:
            return self._evaluate(hidden, head, loss, evaluate)
        result = self._train(hidden, head, loss)
        if measure_bias and isinstance(loss.teacher, HiddenRows):
            # Here because the head is whole only here, at ZeRO stage 3.
            result["signal_bias"] = signal_bias(
                hidden, head, loss.teacher, self.divergence, sampled_ids=tokens.targets, **self._options
            )
        return result

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "temperature": self.loss.temperature,
            "chunk_rows": self.loss.chunk_rows,
        }

    def _train(self, hidden: torch.Tensor, head: Head, loss: TokenLoss) -> dict[str, Any]:
        squared = self.loss.temperature_squared
        output = divergence_loss(
            hidden,
            head,
            loss.teacher,
            self.divergence,
            policy=loss.policy,
            weights=loss.weights,
            temperature_squared=squared,
            **self._options,
        )
        metrics = {
            DIVERGENCE.name: output.values,
            STUDENT_ENTROPY.name: output.student_entropy,
            TEACHER_ENTROPY.name: output.teacher_entropy,
            AGREEMENT.name: output.agreement,
            **loss.metrics,
        }
        if loss.reference is None:
            return {"loss": output.loss, "metrics": metrics}
        reference = divergence_loss(
            hidden,
            head,
            loss.reference,
            ReverseKL(),
            weights=loss.reference_weights,
            temperature_squared=squared,
            **self._options,
        )
        metrics[REFERENCE_KL.name] = reference.values
        return {"loss": output.loss + reference.loss, "metrics": metrics}

    @torch.no_grad()
    def _evaluate(
        self, hidden: torch.Tensor, head: Head, loss: TokenLoss, evaluate: Sequence[tuple[str, Divergence]]
    ) -> dict[str, Any]:
        if not isinstance(loss.teacher, SampledRows):
            assert loss.teacher is not None
            return divergence_values(hidden, head, loss.teacher, evaluate, **self._options)
        estimate = divergence_loss(hidden, head, loss.teacher, ReverseKL(), **self._options).values
        unknown = torch.full_like(estimate, torch.nan)
        return {name: estimate if name == "reverse_kl" else unknown for name, _ in evaluate}


def load_student(path: Path, dtype: torch.dtype, attention: str, zero3: dict[str, Any] | None) -> PreTrainedModel:
    """Loads the student on the CPU, ready to be wrapped.

    Args:
        path: directory of the checkpoint.
        attention: transformers' ``attn_implementation``.
        zero3: DeepSpeed's configuration at stage 3, else None. The model is then created sharded, and only rank 0
            reads the checkpoint and distributes it parameter by parameter; collective.
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
    tensors = model.state_dict(keep_vars=True)
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        stages.enter("distributing weights", f"tensor {number} of {len(tensors)}")
        if isinstance(tensor, nn.Parameter):
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0), torch.no_grad():
                if rank == 0:
                    tensor.copy_(weights[name])
        else:
            if rank == 0:
                tensor.copy_(weights[name])
            torch.distributed.broadcast(tensor, 0)
    return model
