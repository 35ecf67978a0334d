"""From folders and published sets to batches of views."""
