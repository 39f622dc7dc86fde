"""Gradient statistics: what reaches a vision block through the skip taps, and what through the main path.

Source: "Detached Skip-Links and R-Probe", section 4 and appendix C. `decompose` splits one step's gradient,
`statistics.Window` sums them up, `integrations.training.gradients.follow` does both while a Trainer trains,
`GradientsResult` is what came out.
"""
