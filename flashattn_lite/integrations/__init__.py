"""This library inside other libraries. Each module imports its host only when it is imported."""
