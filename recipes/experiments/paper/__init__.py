"""The experiments of Online Speculative Decoding (arXiv 2310.07177), each a config of another recipe; and their report beside the paper's figures."""
