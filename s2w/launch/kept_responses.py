"""The responses of an evaluation under way, on disk as they finish: what ends it early costs none of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2w.errors import ConfigError
from s2w.observe import jsonl
from s2w.records import Request, Rollout


class KeptResponses:
    """A JSONL file with a line for each response to one of ``requests``, after one that tells whose it is.

    Args:
        path: of the file, in a directory that exists.
        requests: all that the evaluation asks.
        settings: JSON values that the responses depend on besides.

    Raises:
        ConfigError: the file holds responses to other requests, or under other settings.
    """

    def __init__(self, path: Path, requests: Sequence[Request], settings: dict[str, Any]) -> None:
        self.path, self._requests = path, requests
        asked = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for request in requests:
            prompt = request.prompt
            asked.update(json.dumps([prompt.seed, request.sample, request.thinking_budget]).encode())
            asked.update(prompt.token_ids.tobytes())
        header = {"requests_sha256": asked.hexdigest()}
        first, *rest = jsonl.read(path) or [header]
        if first != header:
            raise ConfigError(
                f"{str(path)!r} holds responses of an evaluation with other settings, which did not come to its end: "
                "delete it, or write another eval.output"
            )
        self._there = {line["request"]: line for line in rest}
        self._header = [] if path.exists() else [header]

    def __len__(self) -> int:
        return len(self._there)

    @property
    def missing(self) -> list[int]:
        """Indices of the requests without a response."""
        return [i for i in range(len(self._requests)) if i not in self._there]

    def add(self, request: int, rollout: Rollout) -> None:
        """Keeps the response to the request with this index."""
        line = {
            "request": request,
            "token_ids": rollout.token_ids.tolist(),
            "finish_reason": rollout.finish_reason,
            "forced": [list(span) for span in rollout.forced],
        }
        jsonl.append(self.path, [*self._header, line])
        self._header = []
        self._there[request] = line

    def rollouts(self) -> list[Rollout]:
        """All responses, in the order of the requests; log-probs are NaN, since they are not kept."""
        return [self._rollout(request, self._there[i]) for i, request in enumerate(self._requests)]

    def delete(self) -> None:
        """The evaluation has come to its end."""
        self.path.unlink(missing_ok=True)

    def _rollout(self, request: Request, line: dict[str, Any]) -> Rollout:
        return Rollout(
            prompt=request.prompt,
            sample=request.sample,
            token_ids=np.array(line["token_ids"], np.int32),
            log_probs=np.full(len(line["token_ids"]), np.nan, np.float32),
            versions=(),
            finish_reason=line["finish_reason"],
            engine=-1,
            started=0.0,
            finished=0.0,
            forced=tuple((start, stop) for start, stop in line["forced"]),
        )
