"""Stands in for the compiled CPU kernels, which the hub's build leaves out."""

WHY_NOT = "the hub's build has no kernels for the CPU; the package dami-kernels has them"
