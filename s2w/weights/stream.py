"""The learner's parameters as a stream of checkpoint tensors, one parameter at a time.

transformers 5 fuses parameters on loading (the experts of a layer become ``experts.gate_up_proj`` and
``experts.down_proj``) and splits them on saving. vLLM loads checkpoints, so a swap uses the same reversal,
:func:`transformers.core_model_loading.revert_weight_conversion`, which knows every architecture of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """Name, wire dtype and full shape of one tensor of the checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class CheckpointStream:
    """The model's weights under their checkpoint names, in the dtype of the engines.

    Has both parts of vLLM's ``WeightSource`` interface (``metadata`` and iteration) without importing vLLM.
    A tied ``lm_head`` is one parameter, hence listed once, under the embedding's name. Buffers are not listed.

    Args:
        model: the transformers model itself, not a wrapper; gives names and full shapes (also under ZeRO-3).
        parameters: starts a new pass over ``(name, full tensor)`` of ``model.named_parameters()``, in that order.
            Gathering may be collective, so every rank must finish each pass.
        dtype: the engines'; floating-point tensors are cast to it, others are sent as they are.

    Raises:
        ValueError: a parameter has no checkpoint form by itself (several are merged into one on saving).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.parameters, self.dtype = model, parameters, dtype
        # On the meta device: what the whole model becomes, and what each parameter becomes by itself.
        full = {
            # Under ZeRO-3 a parameter's own shape is (0,); DeepSpeed keeps the full one next to it.
            name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
            for name, parameter in model.named_parameters()
        }
        whole = revert_weight_conversion(model, full)
        self._parts: dict[str, list[CheckpointTensor]] = {}
        for name, tensor in full.items():
            self._parts[name] = []
            for part, value in self._revert(name, tensor):
                if part not in whole or whole[part].shape != value.shape:
                    raise ValueError(
                        f"{name} cannot be sent by itself: as {part} it is merged with other parameters "
                        f"in checkpoints of {type(model).__name__}"
                    )
                self._parts[name].append(CheckpointTensor(part, self._wire_dtype(value), tuple(value.shape)))
        if missing := whole.keys() - {tensor.name for tensor in self.metadata()}:
            raise ValueError(f"no parameter of {type(model).__name__} gives the checkpoint's {sorted(missing)[:8]}")

    def metadata(self) -> list[CheckpointTensor]:
        """What iteration yields, in order; gathers no weights."""
        return [tensor for parts in self._parts.values() for tensor in parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stream."""
        return sum(tensor.nbytes for tensor in self.metadata())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields ``(name, tensor)`` in the wire dtype, each valid until the next; not always contiguous.

        Raises:
            ValueError: ``parameters`` does not yield the model's parameters in order.
        """
        expected = iter(self._parts)
        for name, tensor in self.parameters():
            if name != next(expected, None):
                raise ValueError(f"parameter {name} is not the next one of model.named_parameters()")
            for part, value in self._revert(name, tensor.detach()):
                yield part, value.to(self._wire_dtype(value))
        if (left := next(expected, None)) is not None:
            raise ValueError(f"parameters ended before {left}")

    def drain(self) -> None:
        """One pass that sends nothing: a rank's part in the collective gathering."""
        for _ in self.parameters():
            pass

    def _revert(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield from revert_weight_conversion(self.model, {name: tensor}).items()

    def _wire_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype
