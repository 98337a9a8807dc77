"""The contracts and the machine: what a pass is, what a model is made of, and the pipeline that verifies every step."""

__version__ = "0.1.0"
