"""Entry point that vLLM calls in each of its processes (front end, engine core, workers)."""


def register() -> None:
    """Registers the teacher's scoring models and the shared-memory weight transfer; idempotent."""
    from s2w.teacher import scoring
    from s2w.weights import shm

    scoring.register()
    shm.register()
