"""``flashattn-lite bench serving``: load on the serving loop, and comparisons with transformers.

``workload`` says who asks for what and when, ``drive`` plays it, ``measures`` judges it,
``contenders`` are the engine and transformers on the same prompts, ``command`` is the command line.
"""
