"""Start a command on many processes: here, on Slurm, Kubernetes, SkyPilot or TPU VMs.

One small spec (``launch.job.Job``) and a few options of the scheduler are rendered to what
that scheduler reads, and handed to its own command-line tool. Nothing here imports jax or
a cloud's libraries.

    python -m launch SCHEDULER --name=NAME [--option=value ...] [--dry_run] -- COMMAND...
"""
