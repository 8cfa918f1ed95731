"""The files of a checkpoint that the run knows and its learner does not."""

from __future__ import annotations

from s2w.launch.job import Job
from s2w.launch.model_card import Phase, model_card
from s2w.launch.run_directory import CHECKPOINTS, OFF_POLICY_CHECKPOINTS
from s2w.learner import checkpoint
from s2w.models import generation
from s2w.models.checkpoint import CARD_FILE
from s2w.records import Sampling


def checkpoint_texts(job: Job, phase: Phase, step: int) -> dict[str, str]:
    """Model card, generation configuration and, where the run has changed it, chat template, by file name.

    Args:
        step: updates of the phase that the checkpoint has had.
    """
    config, base, recorder = job.config, job.models.student, job.recorder
    root = job.directory / (CHECKPOINTS if phase == "on_policy" else OFF_POLICY_CHECKPOINTS)
    rollout = config.rollout
    texts = {
        CARD_FILE: model_card(
            config,
            base,
            phase,
            step,
            checkpoint.step_dir(root, step),
            recorder.evaluations(),
            recorder.off_policy_evaluations(),
        ),
        generation.FILE: generation.generation_config(
            base, Sampling(rollout.temperature, rollout.top_p, rollout.top_k)
        ),
    }
    if config.student.thinking_switch:
        # The file takes precedence over a template in tokenizer_config.json.
        texts["chat_template.jinja"] = str(base.tokenizer.chat_template)
    return texts
