"""`llava-patch demo`: a stock and a patched model answer the same question about an image, side by side."""
