"""Renders a plan to the files of a job.

In: a `Plan`. Out: texts by file name, the same for the same plan. Start with `render.py`, then templates/job.sh.j2.
"""
