"""What other libraries need for the same workloads; each script in its own environment."""
