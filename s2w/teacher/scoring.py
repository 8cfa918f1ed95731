"""vLLM plugin: runs any ``*ForCausalLM`` as a teacher, a pooling model that scores and never generates.

For each architecture that vLLM knows, ``Teacher<architecture>`` is the same class with a
:class:`~s2w.teacher.pooler.TeacherPooler`; :func:`as_teacher` renames the architecture in the model's
configuration. Its ``lm_head`` stays as it is, vocabulary-parallel, where vLLM's own pooling conversion drops it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import PretrainedConfig

PREFIX = "Teacher"


@functools.cache
def register() -> None:
    """Registers the teacher models and patches vLLM where scoring needs it; idempotent."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform

    for architecture in [name for name in ModelRegistry.models if name.endswith("ForCausalLM")]:
        # By name, so that no model is imported here: __getattr__ below creates the class.
        ModelRegistry.register_model(PREFIX + architecture, f"{__name__}:{PREFIX}{architecture}")
        if architecture in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[PREFIX + architecture] = MODELS_CONFIG_MAP[architecture]
    _cap_prefix_hits()
    if current_platform.is_cpu():
        _map_experts_on_cpu()


def as_teacher(config: PretrainedConfig) -> PretrainedConfig:
    """``hf_overrides`` of a teacher engine: its architecture, and the head in the model's dtype.

    Raises:
        ValueError: if the model is not a ``*ForCausalLM``.
    """
    architecture = next(iter(config.architectures or []), "")
    if architecture:  # vLLM also asks with an empty configuration, for the model type
        if not architecture.endswith("ForCausalLM"):
            raise ValueError(f"a teacher is a *ForCausalLM model, not {architecture}")
        config.architectures = [PREFIX + architecture.removeprefix(PREFIX)]
    config.head_dtype = "model"  # vLLM gives pooling models a float32 head, twice as slow
    return config


def __getattr__(name: str) -> type:
    """The class ``Teacher<architecture>``."""
    if not name.startswith(PREFIX) or not name.endswith("ForCausalLM"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry
    from vllm.config import VllmConfig

    from s2w.teacher.pooler import TeacherPooler

    base = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.pooler = TeacherPooler(self, vllm_config)

    members = {"__init__": __init__, "__module__": __name__, "is_pooling_model": True}
    return globals().setdefault(name, type(name, (base,), members))


class _ShortRequest:
    """A request that ends after ``num_tokens`` tokens, for the search of the prefix cache."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _cap_prefix_hits() -> None:
    """Ends a prefix hit at the first wanted row.

    vLLM recomputes the last token of a request that the cache holds in full, and a pooler never sees the rows
    of the others: they would be missing from the signal, without an error.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    original = KVCacheManager.get_computed_blocks

    @functools.wraps(original)
    def get_computed_blocks(self: Any, request: Any) -> Any:
        wanted = request.pooling_params and request.pooling_params.extra_kwargs
        if wanted and "start" in wanted:
            request = _ShortRequest(request, min(request.num_tokens, wanted["start"] + 1))
        return original(self, request)

    KVCacheManager.get_computed_blocks = get_computed_blocks  # type: ignore[method-assign]


def _map_experts_on_cpu() -> None:
    """Expert parallelism on CPU: vLLM 0.32's kernel ignores ``expert_map`` and reads past its own experts."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    signature = inspect.signature(original)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        expert_map = call.arguments["expert_map"]
        if expert_map is not None:
            global_ids, weights = call.arguments["topk_ids"], call.arguments["topk_weights"]
            local_ids = expert_map[global_ids.long()]  # -1: another rank's expert
            call.arguments["topk_weights"] = weights * (local_ids >= 0)
            call.arguments["topk_ids"] = local_ids.clamp_min(0).to(global_ids.dtype)
        original(*call.args, **call.kwargs)

    CPUUnquantizedExperts.apply = apply  # type: ignore[method-assign]
