"""The console command, and a record of what its updates trained on: the first argument is the record's file."""

from __future__ import annotations

import sys
from pathlib import Path

from s2w.cli import main
from s2w.controller import Batch, Controller
from s2w.observe import jsonl

if __name__ == "__main__":
    record, arguments = Path(sys.argv[1]), sys.argv[2:]
    train_on = Controller.train_on

    async def recorded(self: Controller, batch: Batch) -> None:
        before = self.step
        try:
            await train_on(self, batch)
        finally:  # The swap may fail after the update.
            if self.step > before:
                uids = [sample.rollout.prompt.uid for sample in batch.samples if sample.rollout.sample == 0]
                jsonl.append(record, [{"step": self.step, "uids": uids}])

    Controller.train_on = recorded  # type: ignore[method-assign]
    raise SystemExit(main(arguments))
