"""Visual saturation: from which layer on does the decoder no longer need its image tokens?

Three curves over the layers, at image and text positions apart: how much a layer turns the hidden states (cosine of its
input and output), how much text attends to the image, and how far each layer's logit-lens prediction is from the last
one's. From them a split is recommended.
"""
