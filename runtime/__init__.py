"""What runs inside the job: the standard library and the framework, never ftgen."""
