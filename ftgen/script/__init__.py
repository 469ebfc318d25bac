"""A plan to the files of a job.

In: a `Plan`. Out: bash and Python, the same text for the same plan. Start with `render.py`, then templates/job.sh.j2.
"""
