"""The study: every method, many learning rates, weight decays and seeds, cell by cell, and what comes out of it."""
