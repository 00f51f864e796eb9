"""Measure: what "forgotten" means, as pure functions."""
