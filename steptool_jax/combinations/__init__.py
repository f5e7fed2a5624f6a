"""Combinations of fields that make no sense: each with what to set instead."""
