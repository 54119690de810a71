"""Proves the fast paths on this machine: the GPU against the CPU, and each path against its slow twin."""
