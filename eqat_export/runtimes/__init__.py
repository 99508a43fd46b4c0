"""The real readers of each format, used as proof."""
