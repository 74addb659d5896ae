"""Shared parts of the studies: records, runner, timing, comparisons, figures and pages."""
