"""The kinds of sources: a table of PostgreSQL or of another database, files; and what is common to them."""
