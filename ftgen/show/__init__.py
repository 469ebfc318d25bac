"""Results as people see them: tables, output formats, the report, watching runs.

In: `Summary`s. Out: text and HTML. Start with `tables.py`, then `report.py`.
"""
