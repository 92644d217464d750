"""Serving: one file or package for each engine. None of them is imported before it is used."""
