"""Tool calls: the Berkeley Function-Calling Leaderboard's questions, and questions answered by running the calls."""
