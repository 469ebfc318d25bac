"""Results as text and pages: tables, output formats, the report, the progress of runs.

In: `Summary`s. Out: text and HTML. Start with `tables.py`, then `report.py`.
"""
