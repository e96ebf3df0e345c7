"""Profiles of single steps: a trace with named tracks for a viewer, and a timeline for the report."""
