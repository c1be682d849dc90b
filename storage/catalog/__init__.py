"""What is in a store: commit log, index, views, rejected rows."""
