"""Entry point that vLLM calls in each of its processes (front end, engine core, workers)."""


def register() -> None:
    """Registers the teacher's scoring models and the shared-memory weight transfer; idempotent."""
    from vllm.platforms import current_platform

    from s2w.teacher import scoring
    from s2w.weights import shm

    scoring.register()
    shm.register()
    if current_platform.is_cpu():
        _sleep_instead_of_spinning()


def _sleep_instead_of_spinning() -> None:
    """Makes vLLM's processes wait for each other on their sockets.

    A process that waits for a message of another spins for up to a second before it does so. On a CPU platform the
    core that it spins on is one that the model's products need. vLLM drops some of the notifications that it sleeps
    on (its sockets hold one at a time) and looks again after five seconds; five milliseconds are short enough here.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SpinCondition.__init__.__defaults__ = (0.0,)  # busy_loop_s
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 5
