"""Shared by tests of several processes: rank groups, a toy world on disk, and the stages of a run one by one."""
