"""Corpora, the calibration set packed from them, and the statistics that a model gathers on it."""
