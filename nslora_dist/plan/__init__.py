"""Memory, traffic and time of a recipe on a cluster, on paper."""
