"""What a run leaves for people: a folder, tables, plots, a page."""
