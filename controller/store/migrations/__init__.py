"""How the tables came to be: one file in `versions/` for each change, never edited once it was released."""
