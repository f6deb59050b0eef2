"""Other people's result files as the table of scores."""
