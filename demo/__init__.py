"""The demonstration: an embedded broker, a source database, and the program that runs the whole path once."""
