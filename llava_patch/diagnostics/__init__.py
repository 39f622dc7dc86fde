"""The measurements behind the papers, one file each."""
