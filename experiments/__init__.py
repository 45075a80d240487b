"""Experiments: named configurations, stored results, and the tables printed from them."""
