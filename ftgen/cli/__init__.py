"""The command line: one file a command.

In: arguments. Out: stdout, stderr and an exit code. Start with `main.py`, then `compile.py`; `options.py` is shared.
"""
