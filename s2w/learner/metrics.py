"""The metrics that the learner computes: at each response token, and of each step."""

from __future__ import annotations

from s2w.metric import define

LOSS = define("loss", "nats/token", "The objective: mean over response tokens.")
DIVERGENCE = define(
    "divergence",
    "nats/token",
    "loss.divergence between teacher and student, without temperature^2; where no teacher scores, the policy "
    "gradient's value.",
    over="tokens",
    column="divergence",
    format=".4f",
)
STUDENT_ENTROPY = define(
    "student_entropy", "nats/token", "Entropy of the student.", over="tokens", column="student H", format=".2f"
)
TEACHER_ENTROPY = define(
    "teacher_entropy",
    "nats/token",
    "Entropy of the teacher; with topk and ids that of the coarsened distribution, NaN with sampled.",
    over="tokens",
    column="teacher H",
    format=".2f",
)
AGREEMENT = define(
    "agreement",
    "share",
    "Positions where teacher and student have the same most likely token; NaN with sampled.",
    over="tokens",
    column="agree",
    format=".0%",
)
GRAD_NORM = define("grad_norm", "1", "Norm of the whole gradient, before clipping.")
LEARNING_RATE = define("learning_rate", "1", "Learning rate of the step.")
SKIPPED = define("skipped", "1", "1 if the gradient was not finite, and the weights are unchanged.")
LEFT_OUT = define("left_out", "share", "Samples of the batch that the objective left out of the update.")
REFERENCE_KL = define(
    "reference_kl",
    "nats/token",
    "KL of the student to its first weights.",
    over="tokens",
)
