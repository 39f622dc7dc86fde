"""Is it worth it to detach skip links? Condition (7) as a prediction, in single steps and in runs."""
