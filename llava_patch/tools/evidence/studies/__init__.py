"""One folder a study: what is run, and what its results say."""
