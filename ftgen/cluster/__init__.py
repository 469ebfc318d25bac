"""What asks a real cluster.

In: a site profile and plans. Out: findings of `ftgen doctor`, and the states of jobs. Start with `doctor.py`.
"""
