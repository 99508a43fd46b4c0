"""What a run says while it works and when it ends; training code knows only ``progress.Reporter``."""
