"""Passes that raise decomposed forms to the ops that mean them, whoever exported the graph."""
