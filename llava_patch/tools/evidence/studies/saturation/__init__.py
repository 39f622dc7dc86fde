"""Where do a decoder's deep layers no longer need the image? Decoders that were cut, and what finds the cut."""
