"""PostgreSQL: the only stateful part, and the only thing that nodes share."""
