"""What `run.py` is made of: child processes, Orbit's HTTP API, and the report at the end."""
