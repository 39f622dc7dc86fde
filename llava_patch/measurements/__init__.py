"""The measurements behind the papers, one file or folder each; `llava_patch` has what a notebook needs of them."""
