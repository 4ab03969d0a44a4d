"""Raw rows: input files, their formats, and labels as people write them."""
