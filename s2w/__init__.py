"""s2w: strong-to-weak distillation of large language models."""

__version__ = "0.2.0"
