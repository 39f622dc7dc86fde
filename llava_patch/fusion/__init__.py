"""Multi-layer vision fusion.

A fusion is one file: `skip_links`, `dense_connector`, `direct_fusion`, `deep_stack` say its settings, which blocks it
taps and where the taps go; `base` is what they share and resolve to. `features.detached_or_not` puts a tap under
stop-gradient, `features.fuse` joins taps with the main feature, `linear` widens the projector, `deep_stack_decoder`
carries DeepStack's taps on; `attach` puts it all on a host model, `training` says what trains in the tower, and when.
"""
