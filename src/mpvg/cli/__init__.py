"""The command `mpvg`: one file for each group of verbs, each parses, calls and prints."""
