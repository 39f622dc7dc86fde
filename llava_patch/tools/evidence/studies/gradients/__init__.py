"""Does the gradient instrument find what was planted in an analytic model?"""
