"""R-Probe: can the first quarter of the LLM rebuild the pixels from the projected tokens?

The way of one sample, a file a step; `measurements/rprobe` has the steps that measure and keep results on disk:

1. `sample`: an image with a text region, its boxes in pixels of the stored image.
2. `transform`: image and boxes on the plane of normalised pixels that the vision tower sees (`window`: of a part).
3. `sequence.Layout`: place and cell (square of pixels) of each token.
4. `view`: the tokens; `target_tokens`: those whose cell meets a box are the target.
5. `measurements/rprobe/store/shard.encode`: the pixels under the targets, cut from the unmasked plane.
6. `sequence.build_sequence`: [context ; text ; target], with positions of the whole image and their rotation.
7. `decoder.ProbeDecoder`: answers the pixels of every target. 8. `measurements/rprobe/evaluate`: error against step 5.

`auxiliary` is the same decoder as an additional loss of training.
"""
