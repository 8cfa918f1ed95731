"""How a response is graded: right or not, in its mode or not, truncated or not, how long."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from s2w.data.verifier_process import VerifierClosedError, VerifierProcess
from s2w.metric import define
from s2w.models.modes import adheres, opens_thinking, split_thinking
from s2w.records import Mode, Rollout

ADHERENCE = define("mode_adherence", "share", "Responses that keep to their prompt's mode.", over="samples")
TRUNCATED = define("truncated", "share", "Responses that ended at their token limit.", over="samples")
RESPONSE_LENGTH = define(
    "response_length", "tokens", "Response tokens, mean over responses.", over="samples", column="length", format=".0f"
)
ACCURACY = define("accuracy", "share", "Right answers, over the prompts that have a verifier.", over="samples")


@dataclass(frozen=True, slots=True)
class Graded:
    """One response, graded."""

    uid: str
    """Of the problem."""
    task: str
    mode: Mode
    correct: bool | None
    """The verifier's score is 1; None if the problem has no verifier."""
    adherent: bool
    """It keeps to its mode, see :func:`s2w.models.modes.adheres`."""
    truncated: bool
    """It ended at its token limit."""
    forced: bool
    """The thinking budget closed its think block."""
    tokens: int

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics over samples, by name; those that it does not have are missing."""
        values = {
            ADHERENCE.name: float(self.adherent),
            TRUNCATED.name: float(self.truncated),
            RESPONSE_LENGTH.name: float(self.tokens),
        }
        return values if self.correct is None else {**values, ACCURACY.name: float(self.correct)}


class Grader:
    """Grades responses; a context manager. Its verifier runs in a child process, started when first needed.

    Args:
        tokenizer: the student's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self._opened = tokenizer, opens_thinking(tokenizer)
        self._verifier: VerifierProcess | None = None
        self._closed = False
        self._changing = threading.Lock()

    def grade(self, rollouts: Iterable[Rollout]) -> list[Graded]:
        """Grades in order. Not for use from several threads at once.

        Raises:
            ConfigError: a problem's verifier has no answer to compare with.
            VerifierError: a verifier of the user's fails on a response.
            VerifierClosedError: :meth:`close` was called meanwhile.
        """
        return [self._grade(rollout) for rollout in rollouts]

    def text(self, rollout: Rollout) -> str:
        """The response without special tokens; think tags stay, which in Qwen3 are not special."""
        return str(self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True))

    def _grade(self, rollout: Rollout) -> Graded:
        prompt = rollout.prompt
        response = split_thinking(self.text(rollout), prompt.mode, opened=self._opened and prompt.mode == "think")
        correct = None
        if prompt.task:
            correct = self._started_verifier().verify(prompt, response.answer) == 1.0
        return Graded(
            uid=prompt.uid,
            task=prompt.task,
            mode=prompt.mode,
            correct=correct,
            adherent=adheres(response, prompt.mode),
            truncated=rollout.finish_reason == "length",
            forced=bool(rollout.forced),
            tokens=len(rollout.token_ids),
        )

    def _started_verifier(self) -> VerifierProcess:
        with self._changing:
            if self._closed:
                raise VerifierClosedError("the grader has been closed")
            if self._verifier is None:
                self._verifier = VerifierProcess()
            return self._verifier

    def close(self) -> None:
        """Ends the child process for good; grading still under way in a thread ends with an error."""
        with self._changing:
            self._closed = True
            if self._verifier is not None:
                self._verifier.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
