"""`plan`: a model over several machines on paper: bytes, exchanges, times, and a fleet of such machines."""
