"""The command line: one file per command.

In: arguments. Out: stdout, stderr and an exit code. Start with `main.py`, then `compile.py`. All commands use `options.py`.
"""
