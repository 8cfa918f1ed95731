"""Writes prompts.jsonl: sums of three numbers, which the testbed's teacher knows how to find."""

from __future__ import annotations

import json
import random
from pathlib import Path

random.seed(0)
with Path(__file__).with_name("prompts.jsonl").open("w") as file:
    for _ in range(700):
        terms = [random.randint(10, 99) for _ in range(3)]
        print(json.dumps({"prompt": "+".join(map(str, terms)), "terms": terms, "task": "sums:adds_up"}), file=file)
