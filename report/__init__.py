"""Pictures of stores and runs in one HTML file that needs no network."""
