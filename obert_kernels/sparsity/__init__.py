"""Which weights can go, in which pattern, and how many at each step."""
