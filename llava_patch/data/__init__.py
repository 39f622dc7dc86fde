"""What commands and measurements read: images with questions and answers, regions of text, and loaded checkpoints."""
