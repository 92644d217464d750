"""Turns two models into one with an adjustable λ."""
