"""What tests of several folders share: models, batches, files on disk, and programs for processes of their own."""
