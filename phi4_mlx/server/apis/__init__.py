"""HTTP bodies to requests and answers to bodies, one file an API."""
