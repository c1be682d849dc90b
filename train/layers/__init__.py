"""What drafts are built of."""
