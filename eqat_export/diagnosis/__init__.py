"""What is wrong with a checkpoint, found on the checkpoint alone; each module knows one kind of damage."""
