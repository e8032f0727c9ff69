"""Engines in processes of their own, which share the lines of a job and may die."""
