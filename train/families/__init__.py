"""Draft families: one folder and one registry line each."""
