"""What the commands print: progress, choices and results of training, lists and the pages of single entries."""
