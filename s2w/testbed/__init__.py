"""A small world that trains in minutes on two cores: a task, its tokenizer, a trained 1M teacher and a 0.1M student.

Large enough that off-policy distillation, on-policy distillation and reinforcement learning differ on it, as in
Table 21 of the Qwen3 Technical Report (arXiv 2505.09388); small enough to run that comparison with seeds.
"""
