"""Settings of every method, how gin binds them, and what is configured now. Imports neither torch nor transformers."""
