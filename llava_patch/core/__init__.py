"""What everything else stands on: errors, files, paths, undo, the terminal, figures. Nothing here knows a model."""
