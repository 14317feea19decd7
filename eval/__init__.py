"""Evaluation: detectors, statistics, distances, tables, claims and the report."""
