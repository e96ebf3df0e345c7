"""Profiles of single steps: a trace with named lanes for a viewer, and a timeline for the report."""
