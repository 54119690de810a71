"""The engine process: scheduling, the prefix cache, and the supervisor that restarts it."""
