"""Patching jobs: one grid for each of many pairs of prompts, computed in parts that outlive interruptions."""
