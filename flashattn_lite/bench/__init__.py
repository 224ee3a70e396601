"""The benchmark: ``flashattn-lite bench``, for checkouts and for people who only pip-installed.

A *case* (cases.py) says what is computed; *contenders* (contenders.py) are the functions that
compute it, ours and theirs; timing.py runs them in turn in one process and keeps every round;
exactness.py compares with the float64 oracle before any time is taken; runner.py turns cases into
rows; results.py is the JSON; tables.py and report.py print it.
"""
